"""The base model's tokenizer with tokens of an adapter's own.

It shares the vocabulary: only added tokens are held again. `tokenizers` numbers those itself, so
ids are translated:

    text ──tokenizer──> its ids ──encoded──> the model's ──decodable──> its ids ──tokenizer──> text
"""

from collections.abc import Sequence
from typing import Any

from cluster.values import AddedToken

_PROBE = "a"


class OwnTokenizer:
    """base: a `tokenizers.Tokenizer`, which stays as it is.

    A base token goes if the adapter has its id or its text. texts: of all added tokens, by the
    model's id. special: those of them that are.
    ids: of the adapter's.
    """

    def __init__(self, base: Any, tokens: Sequence[AddedToken]) -> None:
        from tokenizers import AddedToken as Entry
        from tokenizers import Tokenizer

        own_texts = {token.text for token in tokens}
        entries = {
            number: entry
            for number, entry in base.get_added_tokens_decoder().items()
            if entry.content not in own_texts
        }
        for token in tokens:
            entries[token.id] = Entry(
                token.text,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
        self.backend = Tokenizer(base.model)
        for part in ("normalizer", "pre_tokenizer", "decoder", "encode_special_tokens"):
            value = getattr(base, part)
            if value is not None:
                setattr(self.backend, part, value)
        self.backend.add_tokens([entries[number] for number in sorted(entries)])
        self.ids = frozenset(token.id for token in tokens)
        self.texts: dict[int, str] = {number: entry.content for number, entry in entries.items()}
        self.special = frozenset(number for number, entry in entries.items() if entry.special)
        theirs = self.backend.get_added_tokens_decoder()
        to_backend = {entry.content: number for number, entry in theirs.items()}
        self._to_backend = {number: to_backend[text] for number, text in self.texts.items()}
        self._to_model = {theirs: ours for ours, theirs in self._to_backend.items()}
        self._pieces = self.backend.get_vocab_size(with_added_tokens=False)
        self._before, self._after = _frame(base)

    def encoded(self, tokens: Sequence[int], add_special_tokens: bool) -> tuple[int, ...]:
        """The model's ids. tokens: of the backend, without special tokens around them."""
        ours = [self._to_model.get(token, token) for token in tokens]
        return (*self._before, *ours, *self._after) if add_special_tokens else tuple(ours)

    def decodable(self, tokens: Sequence[int]) -> list[int]:
        """The backend's ids. Those that have no text are left out, as `tokenizers` does."""
        return [
            self._to_backend.get(token, token)
            for token in tokens
            if token in self._to_backend or token < self._pieces
        ]


def _frame(base: Any) -> tuple[list[int], list[int]]:
    """What is put before and after a text. Its ids are the model's, so the backend does not."""
    bare = base.encode(_PROBE, add_special_tokens=False).ids
    whole = base.encode(_PROBE, add_special_tokens=True).ids
    starts = range(len(whole) - len(bare) + 1)
    at = next((i for i in starts if whole[i : i + len(bare)] == bare), len(whole))
    return whole[:at], whole[at + len(bare) :]
