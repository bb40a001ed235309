"""Turns a request's sampling fields, and the model's own defaults, into `Sampling`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import BadRequest, ModelUnsupported
from replica.api.openai_protocol import REPETITION_PENALTY_MIN, GenerationRequest, shown
from replica.api.structured import grammar_of
from replica.api.text import INLINE_CHARACTERS, Text
from replica.model.shape import read_json
from replica.scheduling.request import Sampling

# As in vLLM and OpenAI, a larger bias counts as this.
_BIAS_MAX = 100.0
_TOKEN = re.compile("0|[1-9][0-9]{0,9}")
# A lower temperature counts as 0: logits divided by it would overflow.
_TEMPERATURE_MIN = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """For fields that a request leaves out. max_tokens: the most that an answer gets then."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


OPENAI_DEFAULTS = SamplingDefaults()


def read_defaults(model_dir: str) -> SamplingDefaults:
    """From `generation_config.json`, the fields that vLLM takes. Raises ModelUnsupported."""
    path = Path(model_dir) / "generation_config.json"
    if not path.is_file():
        return OPENAI_DEFAULTS
    given = read_json(path)

    def number(name: str, low: float, high: float, otherwise: float) -> float:
        value = given.get(name)
        if value is None:
            return otherwise
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not low <= value <= high:
            raise ModelUnsupported(f"{path}: {name} {value!r} is not between {low} and {high}")
        return float(value)

    count = int(number("max_new_tokens", 0, 2**31, 0))
    return SamplingDefaults(
        temperature=number("temperature", 0, 100, 1.0),
        top_p=number("top_p", 0, 1, 1.0) or 1.0,
        top_k=int(number("top_k", -1, 2**31, 0)),
        min_p=number("min_p", 0, 1, 0.0),
        repetition_penalty=number("repetition_penalty", REPETITION_PENALTY_MIN, 100, 1.0),
        max_tokens=count or None,
    )


class SamplingReader:
    """Checks token ids against the vocabulary, and tokenizes bad words."""

    def __init__(self, vocab: int, defaults: SamplingDefaults) -> None:
        self._vocab = vocab
        self.defaults = defaults

    async def read(
        self, text: Text, request: GenerationRequest, max_tokens: int, logprobs: int | None
    ) -> Sampling:
        """text: the request's. Raises BadRequest naming the field."""
        stop_tokens = request.stop_token_ids or []
        self.check(stop_tokens, "stop_token_ids")
        allowed = request.allowed_token_ids
        self.check(allowed or [], "allowed_token_ids")
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise BadRequest(
                f"min_tokens: {min_tokens} is more than max_tokens, {max_tokens}",
                field="min_tokens",
            )
        defaults = self.defaults
        asked = [request.prompt_logprobs, logprobs if request.echo else None]
        temperature = _or(request.temperature, defaults.temperature)
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature if temperature >= _TEMPERATURE_MIN else 0.0,
            top_p=_or(request.top_p, defaults.top_p),
            top_k=max(0, int(_or(request.top_k, defaults.top_k))),
            seed=request.seed,
            stop_tokens=frozenset(stop_tokens),
            ignore_eos=bool(request.ignore_eos),
            logprobs=logprobs,
            min_p=_or(request.min_p, defaults.min_p),
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._biases(request.logit_bias or {}),
            allowed_tokens=None if allowed is None else tuple(sorted(set(allowed))),
            bad_words=_bad_words(text, request.bad_words or []),
            grammar=await grammar_of(request),
            prompt_logprobs=max((n for n in asked if n is not None), default=None),
        )

    def check(self, tokens: Sequence[int], field: str) -> None:
        if not tokens or (min(tokens) >= 0 and max(tokens) < self._vocab):
            return
        for i, token in enumerate(tokens):
            if not 0 <= token < self._vocab:
                raise BadRequest(
                    f"{field}[{i}]: token id {shown(token)} is not between 0 and {self._vocab - 1}",
                    field=field,
                )

    def _biases(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        biases = []
        for name, bias in given.items():
            token = int(name) if _TOKEN.fullmatch(name) else -1
            if not 0 <= token < self._vocab:
                raise BadRequest(
                    f"logit_bias: {shown(name)} is not a token id between 0 and {self._vocab - 1}",
                    field="logit_bias",
                )
            biases.append((token, min(max(bias, -_BIAS_MAX), _BIAS_MAX)))
        return tuple(biases)


def _bad_words(text: Text, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the start of a text and, if they differ, after a space."""
    found = []
    check_characters("bad_words", sum(len(word) + 1 for word in words))
    for i, word in enumerate(words):
        bare, spaced = (text.word_tokens(s + word.lstrip()) for s in ("", " "))
        if not bare:
            raise BadRequest(f"bad_words[{i}]: {shown(word)} has no tokens", field="bad_words")
        found.append(bare)
        # As in vLLM: not where the space is a token of its own before the same word.
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found.append(spaced)
    return tuple(found)


def check_characters(field: str, characters: int) -> None:
    """Raises BadRequest: what is read between the steps of everybody's streams is to be short."""
    if characters > INLINE_CHARACTERS:
        raise BadRequest(
            f"{field}: {characters} characters, over the limit of {INLINE_CHARACTERS}", field=field
        )


def _or(value: Any, default: float) -> Any:
    return default if value is None else value
