"""What adapters change of the embedding and the head, in plain torch on any device.

Few adapters do, so there is no kernel, and no captured graph has it. Each such adapter is computed
for all rows of the batch, and a mask keeps its own: no step waits for the device to count rows.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lora_kernels.reference import Directory, VocabularyDelta


class Vocabulary:
    """One step at a time: `begin` with the rows' slots, then `embed` and `head`."""

    def __init__(self, directory: Directory, arena: torch.Tensor) -> None:
        self._directory = directory
        self._arena = arena
        self._deltas: list[tuple[int, VocabularyDelta]] = []
        self._slots = torch.empty(0, dtype=torch.int32)

    def concerns(self, row_slots: Sequence[int]) -> bool:
        """True if an adapter of the batch changes embedding or head."""
        return not self._directory.vocabulary.keys().isdisjoint(row_slots)

    def begin(self, row_slots: Sequence[int]) -> None:
        """row_slots: one slot a token; 0 is the base model."""
        self._deltas = []
        if not self.concerns(row_slots):
            return
        held = self._directory.vocabulary
        for slot in sorted(held.keys() & set(row_slots)):
            self._deltas += [(slot, delta) for delta in held[slot]]
        slots = torch.tensor(row_slots, dtype=torch.int32)
        if self._arena.is_cuda:
            slots = slots.pin_memory()
        self._slots = slots.to(self._arena.device, non_blocking=True)

    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor, scale: float = 1.0) -> None:
        """Changes the tokens' embeddings [tokens, hidden size], in place.

        scale: what the model multiplied them with.
        """
        for slot, delta in self._deltas:
            if delta.head:
                continue
            own = (self._slots == slot)[:, None]
            if delta.rank is None:
                rows = F.embedding(tokens, self._weight(delta, delta.inputs)) * scale
                hidden.copy_(torch.where(own, rows, hidden))
                continue
            a, b = self._matrices(delta, delta.rank)
            hidden.addmm_(F.embedding(tokens, a.T) * own, b.T, alpha=delta.scale * scale)

    def head(
        self,
        x: torch.Tensor,
        logits: torch.Tensor,
        wanted: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Changes logits [outputs, vocab], in place.

        x: [outputs, hidden size]. wanted: the token of each output; None: all. bias: of the head.
        """
        for slot, delta in self._deltas:
            if not delta.head:
                continue
            slots = self._slots if wanted is None else self._slots.index_select(0, wanted)
            own = (slots == slot)[:, None]
            if delta.rank is None:
                rows = F.linear(x, self._weight(delta, delta.outputs), bias)
                logits.copy_(torch.where(own, rows, logits))
                continue
            a, b = self._matrices(delta, delta.rank)
            logits.addmm_(x @ a.T * own, b.T, alpha=delta.scale)

    def _weight(self, delta: VocabularyDelta, vocab: int) -> torch.Tensor:
        return self._arena[delta.b_offset : delta.b_offset + delta.elements].view(vocab, -1)

    def _matrices(self, delta: VocabularyDelta, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = delta.a_offset, delta.b_offset
        return (
            self._arena[a : a + rank * delta.inputs].view(rank, -1),
            self._arena[b : b + rank * delta.outputs].view(-1, rank),
        )
