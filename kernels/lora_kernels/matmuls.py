"""LoRA for an adapter with many rows: two matmuls a projection, on views of the arena."""

from collections.abc import Sequence

import torch

from lora_kernels.reference import Directory, gains, matrices

_Views = list[tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None] | None]


class Matmuls:
    """groups: (index, inputs, outputs) of each group's projections."""

    def __init__(
        self,
        directory: Directory,
        arena: torch.Tensor,
        groups: Sequence[Sequence[tuple[int, int, int]]],
    ) -> None:
        self._directory = directory
        self._arena = arena
        self._groups = groups
        self._views: dict[int, tuple[int, list[_Views]]] = {}

    def add(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        slot: int,
        rows: torch.Tensor | slice,
        layer: int,
        group: int,
    ) -> None:
        """Adds the delta of the slot's adapter to `rows` of y, then applies its gain, in place."""
        views = self._slot_views(slot)[layer]
        own = x[rows]
        start = 0
        for projection, _, outputs in self._groups[group]:
            view = views[projection]
            if view is not None:
                a, b, scale, gain = view
                target = y[:, start : start + outputs]
                if isinstance(rows, slice):
                    target[rows].addmm_(own @ a.T, b.T, alpha=scale)
                else:
                    target.index_add_(0, rows, own @ a.T @ b.T, alpha=scale)
                if gain is not None:
                    target[rows] = (target[rows] * gain.float().sum(0)).to(y.dtype)
            start += outputs

    def _slot_views(self, slot: int) -> list[_Views]:
        """[layer][projection] → A, B, scale, gains. Views of the arena, cached for a generation."""
        generation = int(self._directory.generation[slot])
        kept = self._views.get(slot)
        if kept is None or kept[0] != generation:
            layers = self._directory.rank.shape[1]
            kept = (generation, [self._layer_views(slot, layer) for layer in range(layers)])
            self._views[slot] = kept
        return kept[1]

    def _layer_views(self, slot: int, layer: int) -> _Views:
        views: _Views = [None] * self._directory.rank.shape[2]
        for projection, inputs, outputs in (entry for group in self._groups for entry in group):
            if self._directory.rank[slot, layer, projection]:
                a, b = matrices(
                    self._directory, self._arena, slot, layer, projection, inputs, outputs
                )
                scale = float(self._directory.scale[slot, layer, projection])
                gain = gains(self._directory, self._arena, slot, layer, projection, outputs)
                views[projection] = (a, b, scale, gain)
        return views


def index_of(rows: Sequence[int], device: torch.device) -> torch.Tensor | slice:
    """An index for `rows`, which are sorted: a slice if they are contiguous, else a tensor."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def gained_rows(
    directory: Directory, row_slots: Sequence[int], arena: torch.Tensor
) -> torch.Tensor | None:
    """[rows, 1] in the arena's dtype: 1 where the adapter has gains, else 0. None if none has."""
    if directory.gained.isdisjoint(row_slots):
        return None
    rows = torch.tensor([[slot in directory.gained] for slot in row_slots], dtype=arena.dtype)
    return rows.pin_memory().to(arena.device, non_blocking=True) if arena.is_cuda else rows
