"""Chooses how LoRA deltas are computed, by device and by the shape of the batch."""

from collections.abc import Sequence

import torch

from lora_kernels.reference import Directory, matrices


class Lora:
    """One step at a time: `begin` with the rows' slots, then `add` for each layer and group.

    groups: for each launch, (index, inputs, outputs) of its projections, in the order in which
    their outputs lie in y. They share their input.
    """

    def __init__(
        self,
        directory: Directory,
        arena: torch.Tensor,
        groups: Sequence[Sequence[tuple[int, int, int]]],
    ) -> None:
        self._directory = directory
        self._arena = arena
        self._groups = [tuple(group) for group in groups]
        self._segments: list[tuple[int, torch.Tensor]] = []

    def begin(self, row_slots: Sequence[int]) -> None:
        """row_slots: one slot a token row; 0 is the base model."""
        rows: dict[int, list[int]] = {}
        for row, slot in enumerate(row_slots):
            if slot:
                rows.setdefault(slot, []).append(row)
        self._segments = [
            (slot, torch.tensor(found, device=self._arena.device)) for slot, found in rows.items()
        ]

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None:
        """Adds the deltas to y [rows, outputs of the group], in place, before the bias."""
        for slot, rows in self._segments:
            own = x[rows]
            start = 0
            for projection, inputs, outputs in self._groups[group]:
                scale = float(self._directory.scale[slot, layer, projection])
                if self._directory.rank[slot, layer, projection]:
                    a, b = matrices(
                        self._directory, self._arena, slot, layer, projection, inputs, outputs
                    )
                    y[:, start : start + outputs].index_add_(0, rows, own @ a.T @ b.T, alpha=scale)
                start += outputs
