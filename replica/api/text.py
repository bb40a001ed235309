"""Converts between text and tokens: tokenizer, chat template, detokenizer."""

import asyncio
import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from jinja2 import TemplateError, TemplateSyntaxError

from cluster.errors import BadRequest, ModelUnsupported
from cluster.values import AddedToken
from replica.api.own_tokenizer import OwnTokenizer
from replica.api.template_process import TemplateOverrun, TemplateProcess
from replica.model.shape import read_json
from replica.model.tokenizer import read_tokenizer

# A character has at most four bytes, hence at most four tokens, with tokens without text possible
# in between. If text still ends in U+FFFD after this many tokens, the model produced it on purpose.
HELD_TOKENS_MAX = 16
# Prompt tokens needed to tell whether the first output token starts with a space.
CONTEXT_TOKENS = 6
REPLACEMENT = "\ufffd"
# Longer texts are tokenized on another thread: 240 kB take 0.2 s, which would stall every stream.
INLINE_CHARACTERS = 8192
INLINE_TOKENS = 2048
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """The chat template that an adapter brings. adapter: its name. eos_text: its own `eos_token`'s;
    None: the base model's.
    """

    adapter: str
    text: str
    eos_text: str | None = None


class Text:
    """The model's tokenizer and chat template. All requests share one, but for those of adapters
    that add tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._own: OwnTokenizer | None = None  # the backend is its
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {token: entry.content for token, entry in added.items()}
        self.special = frozenset(token for token, entry in added.items() if entry.special)
        self._bytes = _byte_alphabet() if "ByteLevel" in repr(self._backend.decoder) else None
        self._template_reserved = _named_parameters(tokenizer.apply_chat_template)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._token_characters_max = max(map(len, vocabulary), default=1)
        self.takes_tokens = len(set(vocabulary.values())) > max(vocabulary.values(), default=0)
        self._templates = TemplateProcess()

    @classmethod
    def read(cls, model_dir: str) -> "Text":
        """Reads the tokenizer files in a model directory. Raises ModelUnsupported."""
        try:
            tokenizer = read_tokenizer(model_dir)
        except ModelUnsupported:
            raise
        except Exception as error:  # tokenizers raises plain Exception, and libraries vary.
            reason = " ".join(_broken_file(Path(model_dir), error).split())
            raise ModelUnsupported(reason) from error
        _check_template(tokenizer, model_dir)
        return cls(tokenizer)

    def with_added(self, tokens: Sequence[AddedToken]) -> "Text":
        """For the requests of an adapter that adds these."""
        text, own = copy.copy(self), OwnTokenizer(self._backend, tokens)
        text._own, text._backend = own, own.backend
        text._added, text.special = own.texts, own.special
        lengths = [len(token.text) for token in tokens]
        text._token_characters_max = max(self._token_characters_max, *lengths)
        return text

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, among_many: bool = False
    ) -> tuple[int, ...]:
        """among_many: of a request whose texts are long together."""
        special = add_special_tokens and self._own is None
        if len(text) <= INLINE_CHARACTERS and not among_many:
            encoding = self._backend.encode(text, add_special_tokens=special)
        else:
            # The batch call releases the GIL; `encode` holds it.
            (encoding,) = await asyncio.to_thread(
                self._backend.encode_batch, [text], add_special_tokens=special
            )
        if self._own is not None:
            return self._own.encoded(encoding.ids, add_special_tokens)
        return tuple(encoding.ids)

    def word_tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a short text, without special tokens."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return tuple(ids) if self._own is None else self._own.encoded(ids, False)

    def literal(self, text: str) -> str:
        """A fixed text in a Lark grammar: as its one special token if it is one. The grammar's
        tokenizer is the base model's and has no text for an adapter's own token either.
        """
        token, own = self._added_token(text), () if self._own is None else self._own.ids
        if token in self.special or token in own:
            return f"<[{token}]>"
        return orjson.dumps(text).decode()

    def is_special(self, text: str) -> bool:
        """True if this text is one special token."""
        return self._added_token(text) in self.special

    def _added_token(self, text: str) -> int | None:
        return next((token for token, own in self._added.items() if own == text), None)

    @property
    def chat_template(self) -> str | None:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    @property
    def default_template(self) -> str | None:
        """Of a model that has several, the one named so."""
        template = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def eos_text(self) -> str | None:
        text: str | None = self._tokenizer.special_tokens_map.get("eos_token")
        return text

    def added_text(self, token: int) -> str | None:
        """None if it is none of the added tokens."""
        return self._added.get(token)

    def piece(self, token: int) -> str | None:
        """A token as the vocabulary writes it. None for an id outside of it."""
        if self._own is not None:
            token = next(iter(self._own.decodable([token])), -1)
        piece: str | None = None if token < 0 else self._backend.id_to_token(token)
        return piece

    def token_id(self, text: str) -> int | None:
        """Of the base model's tokenizer."""
        assert self._own is None
        try:
            token: int | None = self._backend.token_to_id(text)
        except UnicodeEncodeError:  # adapters' files may have half a character
            return None
        return token

    def template_error(self, template: str) -> str | None:
        """Why an adapter's chat template cannot be used. Blocking. Raises AdapterFailed."""
        try:
            return self._templates.syntax_error(template)
        except TemplateOverrun as error:
            return str(error)

    def tokens_min(self, text: str) -> int:
        """A lower bound on the number of tokens in `text`, from its length alone."""
        return len(text) // self._token_characters_max

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self.special]
        if self._own is not None:
            tokens = self._own.decodable(tokens)
        if len(tokens) <= INLINE_TOKENS:
            return str(self._backend.decode(tokens, skip_special_tokens=False))
        # The batch call releases the GIL; `decode` holds it.
        (text,) = self._backend.decode_batch([tokens], skip_special_tokens=False)
        return str(text)

    async def decode_long(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As `decode`, for any number of tokens: many are decoded on another thread."""
        if len(tokens) <= INLINE_TOKENS:
            return self.decode(tokens, skip_special_tokens=skip_special_tokens)
        return await asyncio.to_thread(self.decode, tokens, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes, possibly part of a character. b"" for an id outside the vocabulary."""
        if token in self._added:
            return self._added[token].encode()
        piece = self.piece(token)
        if piece is None:
            return b""
        if self._bytes is not None:
            return b"".join(self._bytes.get(c) or c.encode() for c in piece)
        byte = BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return bytes.fromhex(byte[1])
        return piece.replace("\u2581", " ").encode()

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: OwnTemplate | None = None,
        **options: Any,
    ) -> str:
        """As `render_chat`; many or long messages are rendered on another thread, an adapter's own
        template in another process.
        """
        if template is not None:
            return await self._render_own(template, messages, self._options(**options))
        parts = [part for message in messages for part in message.values()]
        try:
            length = sum(len(p if isinstance(p, str) else repr(p)) for p in parts) + len(parts)
        except RecursionError as error:
            raise BadRequest("messages: nested too deep", field="messages") from error
        if length <= INLINE_CHARACTERS:
            return self.render_chat(messages, **options)
        return await asyncio.to_thread(self.render_chat, messages, **options)

    async def _render_own(
        self, own: OwnTemplate, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]
    ) -> str:
        named = self._tokenizer.special_tokens_map
        request = {
            "special_tokens": named | ({"eos_token": own.eos_text} if own.eos_text else {}),
            "messages": messages,
            "options": options,
        }
        where = f"the chat template of the adapter {own.adapter!r}"
        try:
            return await self._templates.render(own.text, request)
        except TemplateOverrun as error:
            raise BadRequest(f"model: {where}: {error}", field="model") from error
        except BadRequest as error:
            raise BadRequest(
                f"messages: refused by {where}: {error.message}", field="messages"
            ) from error

    def _options(
        self,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """Of `apply_chat_template`. Raises BadRequest for `chat_template_kwargs`."""
        arguments = dict(template_arguments or {})
        for name in sorted(self._template_reserved & set(arguments)):
            raise BadRequest(
                f"chat_template_kwargs.{name}: reserved", field=f"chat_template_kwargs.{name}"
            )
        return {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": list(tools) or None,
            **arguments,
        }

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Renders messages with the model's chat template. Raises BadRequest for `messages`.

        options: see `_options`.
        """
        arguments = self._options(**options)
        if self._tokenizer.chat_template is None:
            raise BadRequest(
                "messages: this model has no chat template; use /v1/completions",
                field="messages",
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **arguments
            )
        except (
            TemplateError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            # `read` has checked the template, so the cause is in the messages.
            raise BadRequest(
                f"messages: refused by the model's chat template: {error}", field="messages"
            ) from error
        return str(rendered)

    def detokenizer(
        self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> "Detokenizer":
        return Detokenizer(self, prompt, skip_special_tokens=skip_special_tokens)


def _broken_file(directory: Path, error: Exception) -> str:
    """Names the tokenizer file that caused `error`, and the reason."""
    from tokenizers import Tokenizer

    for path in sorted(directory.glob("*.jinja")):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as reason:
            return f"{path}: {reason}"
    for name in ("tokenizer.json", *SETTINGS_FILES):
        path = directory / name
        if not path.is_file():
            continue
        try:
            read_json(path)
            if name == "tokenizer.json":
                Tokenizer.from_file(str(path))
        except ModelUnsupported as reason:
            return reason.message
        except Exception as reason:
            return f"{path}: {reason}"
    return f"{directory}: cannot read its tokenizer: {type(error).__name__}: {error}"


def _check_template(tokenizer: Any, model_dir: str) -> None:
    """Raises ModelUnsupported if the chat template has a Jinja syntax error."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelUnsupported(
            f"{model_dir}: its chat template, line {error.lineno}: {error.message}"
        ) from error
    except Exception:
        pass  # A valid template may refuse this message, and a model may have none.


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE's (GPT-2) character for each byte, inverted."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _named_parameters(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


class Detokenizer:
    """Converts one choice's tokens to text incrementally.

    Decoding tokens one by one would lose the spaces that some tokenizers write only between
    tokens, and break characters whose bytes span several tokens. Instead, a window of the latest
    tokens is decoded with and without the new ones, and the difference is the new text:

        [ context: text emitted | held: no text yet ]

    Tokens that end in an incomplete character are held. The window is bounded, so each token
    costs O(1).
    """

    def __init__(self, text: Text, prompt: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._text = text
        self._skip = text.special if skip_special_tokens else frozenset[int]()
        self._window = [token for token in prompt[-CONTEXT_TOKENS:] if token not in self._skip]
        self._known = len(self._window)
        self._known_text = self._decode().rstrip(REPLACEMENT)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete, or "" if they complete none."""
        # Token by token, so that the result does not depend on how many tokens a step brings.
        return "".join([self._push(token) for token in tokens if token not in self._skip])

    def _push(self, token: int) -> str:
        self._window.append(token)
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
        """The held text at the end of the answer; an incomplete character becomes U+FFFD."""
        new = self._decode()[len(self._known_text) :]
        self._known = len(self._window)
        self._known_text += new
        return new

    def _decode(self) -> str:
        return self._text.decode(self._window, skip_special_tokens=False)
