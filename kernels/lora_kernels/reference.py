"""The specification in plain torch: what a LoRA launch computes, row by row."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


class Directory:
    """Where each slot's matrices lie in the arena; arrays are [slots, layers, projections].

    A is [rank, in] at `a_offset`, B is [out, rank] at `b_offset`, both row by row, in elements of
    the arena. rank 0: the projection is untouched. `generation[slot]` goes up with each change of
    the slot, so that whoever keeps a copy of its weights can tell a stale one.
    """

    def __init__(self, slots: int, layers: int, projections: int) -> None:
        size = (slots, layers, projections)
        self.a_offset: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.b_offset: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.rank: npt.NDArray[np.int32] = np.zeros(size, np.int32)
        self.scale: npt.NDArray[np.float32] = np.zeros(size, np.float32)
        self.generation: npt.NDArray[np.int64] = np.zeros(slots, np.int64)

    def write(
        self,
        slot: int,
        start: int,
        a_offset: npt.NDArray[np.int64],
        b_offset: npt.NDArray[np.int64],
        rank: npt.NDArray[np.int32],
        scale: npt.NDArray[np.float32],
    ) -> None:
        """The offsets count from `start`, the element of the arena where the image begins."""
        self.a_offset[slot] = a_offset + start
        self.b_offset[slot] = b_offset + start
        self.rank[slot] = rank
        self.scale[slot] = scale
        self.generation[slot] += 1

    def shift(self, slot: int, elements: int) -> None:
        self.a_offset[slot] += elements
        self.b_offset[slot] += elements
        self.generation[slot] += 1

    def clear(self, slot: int) -> None:
        self.rank[slot] = 0
        self.generation[slot] += 1


def lora(
    x: torch.Tensor,
    y: torch.Tensor,
    row_slots: Sequence[int],
    directory: Directory,
    arena: torch.Tensor,
    layer: int,
    group: Sequence[tuple[int, int]],
) -> None:
    """Adds every row's delta to `y` in place, before the bias.

    x: [rows, in]. y: [rows, sum of the group's outputs]. group: (projection's index, its outputs),
    in the order in which they lie in y.
    """
    for row, slot in enumerate(row_slots):
        start = 0
        for projection, outputs in group:
            rank = int(directory.rank[slot, layer, projection])
            if rank:
                a, b = matrices(directory, arena, slot, layer, projection, x.shape[1], outputs)
                shrunk = a.float() @ x[row].float()
                delta = b.float() @ shrunk * float(directory.scale[slot, layer, projection])
                y[row, start : start + outputs] += delta.to(y.dtype)
            start += outputs


def matrices(
    directory: Directory,
    arena: torch.Tensor,
    slot: int,
    layer: int,
    projection: int,
    inputs: int,
    outputs: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of A [rank, in] and B [out, rank] in the arena."""
    rank = int(directory.rank[slot, layer, projection])
    a = int(directory.a_offset[slot, layer, projection])
    b = int(directory.b_offset[slot, layer, projection])
    return (
        arena[a : a + rank * inputs].view(rank, inputs),
        arena[b : b + rank * outputs].view(outputs, rank),
    )
