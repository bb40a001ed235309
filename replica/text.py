"""Text and tokens: tokenizer, chat template, incremental detokenization, stop strings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cluster.errors import BadRequest, ModelUnsupported

# A character takes at most four bytes, so at most four tokens; tokens that add no text may come
# between. Text that still ends in U+FFFD after this many tokens is taken to be meant so.
HELD_TOKENS_MAX = 16
# Enough of the prompt to know whether the first token starts with a space.
CONTEXT_TOKENS = 6
REPLACEMENT = "\ufffd"


class Text:
    """The model's tokenizer and chat template. Stateless: shared by all requests."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.special = frozenset(
            token
            for token, added in self._backend.get_added_tokens_decoder().items()
            if added.special
        )

    @classmethod
    def read(cls, model_dir: str) -> "Text":
        """From the tokenizer files in a model directory. Raises ModelUnsupported."""
        # Not AutoTokenizer: it imports torch, which the HTTP process does not need.
        from transformers import PreTrainedTokenizerFast

        if not (Path(model_dir) / "tokenizer.json").is_file():
            raise ModelUnsupported(f"{model_dir}: has no tokenizer.json")
        return cls(PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True))

    @property
    def vocab(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self.special]
        return str(self._backend.decode(tokens, skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for: perhaps a part of a character."""
        return self.decode((token,), skip_special_tokens=False).encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The messages as the model expects them. Raises BadRequest naming `messages`."""
        if self._tokenizer.chat_template is None:
            raise BadRequest(
                "messages: this model has no chat template; use /v1/completions",
                field="messages",
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_arguments or {}),
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            # The template is the model's; what it refuses is in the messages.
            raise BadRequest(
                f"messages: the model's chat template refuses them: {error}", field="messages"
            ) from error
        return str(rendered)

    def detokenizer(
        self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> "Detokenizer":
        return Detokenizer(self, prompt, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """One choice's tokens → text, as they come.

    Decoding tokens one by one would lose the spaces that some tokenizers write only between
    tokens, and break characters whose bytes are spread over several tokens. So a window of the
    last tokens is decoded with and without the new ones, and the difference is the new text:

        [ context: text given out | held: no text yet ]

    What ends in an unfinished character is held. The window is bounded, so a token costs O(1).
    """

    def __init__(self, text: Text, prompt: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._text = text
        self._skip = text.special if skip_special_tokens else frozenset[int]()
        self._window = [token for token in prompt[-CONTEXT_TOKENS:] if token not in self._skip]
        self._known = len(self._window)
        self._known_text = self._decode().rstrip(REPLACEMENT)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete; "" while there is none."""
        fresh = [token for token in tokens if token not in self._skip]
        if not fresh:
            return ""
        self._window += fresh
        decoded = self._decode()
        held = len(self._window) - self._known
        if decoded.endswith(REPLACEMENT) and held < HELD_TOKENS_MAX:
            return ""
        new = decoded[len(self._known_text) :]
        if not new and held < HELD_TOKENS_MAX:
            return ""
        self._window = self._window[self._known :][-HELD_TOKENS_MAX:]
        self._known = len(self._window)
        self._known_text = self._decode()
        return new

    def flush(self) -> str:
        """At the end: what was held, with U+FFFD for the character that never got finished."""
        new = self._decode()[len(self._known_text) :]
        self._known = len(self._window)
        self._known_text += new
        return new

    def _decode(self) -> str:
        return self._text.decode(self._window, skip_special_tokens=False)


class StopStrings:
    """Looks for stop strings in text that comes in pieces.

    Text that may be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be given out. `found` is set when it ends there."""
        assert self.found is None, "text after the stop"
        text = self._held + piece
        hits = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits:
            start, _, self.found = min(hits)
            self._held = ""
            return text[: start + len(self.found)] if self._include else text[:start]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def release(self, piece: str) -> str:
        """Gives out `piece` and what was held, without looking for stops in it."""
        held, self._held = self._held, ""
        return held + piece

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
