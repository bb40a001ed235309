"""The tokens that an adapter adds to those of the base model's tokenizer.

They are in the first of these that it has, of which transformers 5 writes the last alone:

    added_tokens_decoder in tokenizer_config.json
    added_tokens.json
    added_tokens at the start of tokenizer.json
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from cluster.adapter_paths import ADDED_FILE, HEAD_BYTES, VOCABULARY_FILE
from cluster.values import AddedToken
from replica.adapters.adapter_config import short
from replica.adapters.json_files import member_at_start, read_object, read_start

TOKENS_MAX = 1024
CHARACTERS_MAX = 32 * 2**10  # of all texts
# Most have all their added tokens in as much of `tokenizer.json`.
_FEW_BYTES = 64 * 2**10
MEMBER = "added_tokens_decoder"
_NAMED_MAX = 3
_ID_DIGITS_MAX = 10
_OPTIONS = ("lstrip", "rstrip", "single_word")


class BaseVocabulary(Protocol):
    """What the base model's tokenizer has."""

    @property
    def takes_tokens(self) -> bool:
        """False if tokens cannot be added to it."""

    def added_text(self, token: int) -> str | None:
        """None if it is none of its added tokens."""

    def piece(self, token: int) -> str | None:
        """As its vocabulary writes it; None if it has no such token."""


def read_added(directory: str, settings: Mapping[str, Any]) -> list[AddedToken]:
    """All that it names, by id, without what is no token. settings: its tokenizer_config.json."""
    given = _decoder(settings) or _file(directory) or _vocabulary(directory)
    named = _named(settings)
    found = (_token(number, entry, named) for number, entry in given)
    return sorted((t for t in found if t is not None), key=lambda token: (token.id, token.text))


def own_tokens(
    tokens: Iterable[AddedToken], settings: Mapping[str, Any], base: BaseVocabulary, vocab: int
) -> list[AddedToken]:
    """Without those that the base model has under the same id, and without a padding token beyond
    its vocabulary, which many trainers add: nothing reads or produces it.

    A piece of its ordinary vocabulary stays, as a token that no other piece takes a part of.
    """
    return [
        token
        for token in tokens
        if base.added_text(token.id) != token.text
        and not (token.id >= vocab and base.piece(token.id) == token.text)
        and not _pads(token, settings, vocab)
    ]


def as_member(tokens: Sequence[AddedToken]) -> dict[str, dict[str, Any]]:
    """What `read_added` reads the same tokens from."""
    options = ("special", *_OPTIONS, "normalized")
    return {
        str(token.id): {"content": token.text} | {name: getattr(token, name) for name in options}
        for token in tokens
    }


def why_not(own: Sequence[AddedToken], base: BaseVocabulary, vocab: int) -> str | None:
    """Why an adapter with these tokens cannot be served."""
    if not own:
        return None
    if not base.takes_tokens:
        return f"adds tokens {_list(own)}: the base model's vocabulary leaves out ids"
    beyond = [token for token in own if token.id >= vocab]
    if beyond:
        return (
            f"adds tokens {_list(beyond)} beyond the base model's {vocab}, so that no row of its "
            "embedding stands for them; merge it into a base model that has them, or leave them "
            "out of its tokenizer files if it was trained without"
        )
    taken = [token for token in own if _is_piece(token, base)]
    if taken:
        return f"adds tokens {_list(taken)} with ids of the base model's ordinary tokens"
    ids, texts = Counter(t.id for t in own), Counter(t.text for t in own)
    twice = [token for token in own if ids[token.id] > 1 or texts[token.text] > 1]
    if twice:
        return f"adds tokens {_list(twice)}: an id or a text is there twice"
    if len(own) > TOKENS_MAX or sum(map(len, texts)) > CHARACTERS_MAX:
        return (
            f"adds {len(own)} tokens of {sum(map(len, texts))} characters; the maximum is "
            f"{TOKENS_MAX} of {CHARACTERS_MAX}"
        )
    return None


def added_remarks(
    directory: str, settings: Mapping[str, Any], tokens: Sequence[AddedToken], vocab: int
) -> list[str]:
    """What is not used, for whoever adds the adapter."""
    pads = [token for token in tokens if _pads(token, settings, vocab)]
    found = []
    if pads:
        found.append(
            f"Its pad_token {_list(pads)} is not used: it is beyond the base model's {vocab}."
        )
    if not tokens and len(read_start(directory, VOCABULARY_FILE) or b"") > HEAD_BYTES:
        found.append(
            f"Added tokens in its {VOCABULARY_FILE} are not used: they are not in its first "
            f"{HEAD_BYTES} bytes."
        )
    return found


def _list(tokens: Sequence[AddedToken]) -> str:
    named = ", ".join(f"{short(token.text)} ({token.id})" for token in tokens[:_NAMED_MAX])
    return f"{named} and {len(tokens) - _NAMED_MAX} more" if len(tokens) > _NAMED_MAX else named


def _is_piece(token: AddedToken, base: BaseVocabulary) -> bool:
    """True if its id stands for a part of other texts."""
    piece = base.piece(token.id)
    return piece not in (None, token.text) and base.added_text(token.id) is None


def _pads(token: AddedToken, settings: Mapping[str, Any], vocab: int) -> bool:
    """True if it pads, beyond the vocabulary, and does nothing else."""
    pad, bos, eos = (content_of(settings.get(f"{name}_token")) for name in ("pad", "bos", "eos"))
    return token.id >= vocab and token.text == pad and pad not in (bos, eos)


def content_of(value: Any) -> str | None:
    """A token's text. Options are written beside it, or not."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _decoder(settings: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    given = settings.get(MEMBER)
    return list(given.items()) if isinstance(given, dict) else []


def _file(directory: str) -> list[tuple[Any, Any]]:
    return [(number, text) for text, number in read_object(directory, ADDED_FILE).items()]


def _vocabulary(directory: str) -> list[tuple[Any, Any]]:
    for count in (_FEW_BYTES, HEAD_BYTES):
        raw = read_start(directory, VOCABULARY_FILE, count) or b""
        given = member_at_start(raw.decode(errors="replace"), "added_tokens")
        if isinstance(given, list):
            return [(entry.get("id"), entry) for entry in given if isinstance(entry, dict)]
        if len(raw) < count:
            break
    return []


def _named(settings: Mapping[str, Any]) -> frozenset[str]:
    """The texts that it names as special: eos_token, additional_special_tokens and the like."""
    values: list[Any] = []
    for name, value in settings.items():
        if name.endswith("_token"):
            values.append(value)
        elif name.endswith("_special_tokens"):
            values += value.values() if isinstance(value, dict) else _items(value)
    return frozenset(text for text in map(content_of, values) if text is not None)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _token(number: Any, entry: Any, named: frozenset[str]) -> AddedToken | None:
    """None if it is no token, or has half a character, which no text has."""
    if isinstance(number, str) and number.isdecimal() and len(number) <= _ID_DIGITS_MAX:
        number = int(number)
    text = content_of(entry)
    if type(number) is not int or number < 0 or text is None:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    options = entry if isinstance(entry, dict) else {}
    special = options.get("special") is True or text in named
    chosen = {name: options.get(name) is True for name in _OPTIONS}
    normalized = options.get("normalized")
    if not isinstance(normalized, bool):
        normalized = not special
    return AddedToken(number, text, special, **chosen, normalized=normalized)
