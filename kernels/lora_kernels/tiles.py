"""LoRA for adapters with few rows, on a CPU: a batched matmul over tiles of 16 ranks.

A decode step has one or two rows an adapter. Sixteen adapters over twelve layers take 2,688 tiny
matmuls, whose call overhead dominates. So the batch's adapters have a second copy of their weights,
cut into tiles of 16 ranks:

    a [layers, tiles, projections · 16, in]      b, one a projection: [layers, tiles, 16, out]

A launch gathers x's rows by tile and multiplies them with A in one batched matmul. Then an
`embedding_bag` sums, for each projection and row, B's rows (one a rank) weighted by that product.
Zeros pad the ranks to 16. B includes the scale. A tile computes rows of its own adapter, and
padding rows whose results are unused, so an adapter's weights never affect other adapters' rows.
"""

import contextlib
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lora_kernels.reference import Directory, matrices

TILE_RANK = 16
# True: compute A · xᵀ, which is a third faster in MKL. False: x · Aᵀ, which is faster in oneDNN.
_A_FIRST = {torch.float32: True, torch.bfloat16: False, torch.float16: False}


@dataclass(slots=True)
class _Packed:
    """generation: the slot's when its weights were copied. last_step: the last step with rows."""

    generation: int
    rank: int
    tiles: list[int]
    last_step: int


class TilePack:
    """The tiles of one group of projections. group: (index, inputs, outputs) of each; the inputs
    are shared.
    """

    def __init__(
        self,
        directory: Directory,
        arena: torch.Tensor,
        group: Sequence[tuple[int, int, int]],
        bytes_max: int,
    ) -> None:
        self._directory = directory
        self._arena = arena
        self._group = tuple(group)
        layers = directory.rank.shape[1]
        self._inputs = group[0][1]
        self._outputs = sum(outputs for _, _, outputs in group)
        height = len(group) * TILE_RANK
        tile_elements = layers * (height * self._inputs + TILE_RANK * self._outputs)
        self.capacity = bytes_max // (tile_elements * arena.element_size())
        self._a = _allocate((layers, self.capacity, height, self._inputs), arena.dtype)
        self._b = [
            _allocate((layers, self.capacity, TILE_RANK, outputs), arena.dtype)
            for _, _, outputs in group
        ]
        # oneDNN takes twice as long for 48 columns as for three times 16, but not for 32 columns.
        split = len(group) == 3 and not _A_FIRST[arena.dtype]
        self._parts = len(group) if split else 1
        self._packed: dict[int, _Packed] = {}
        self._free = list(range(self.capacity))
        # Set by `begin`, read by `add`.
        self._rows = torch.empty(0, dtype=torch.int64)
        self._picked = torch.empty(0, dtype=torch.int64)
        self._bags = torch.empty(0, dtype=torch.int64)
        self._bag_starts = torch.empty(0, dtype=torch.int64)
        self._count = 0
        self._height = 0

    def tiles_needed(self, slot: int) -> int:
        return -(-self._rank(slot) // TILE_RANK)

    def holds(self, slot: int) -> bool:
        """True if the slot's current weights are packed, or this group has none of the adapter."""
        entry = self._packed.get(slot)
        if entry is None:
            return self._rank(slot) == 0
        return entry.generation == int(self._directory.generation[slot])

    def drop_stale(self) -> None:
        """Drops adapters whose slot was cleared, rewritten or moved since they were packed."""
        for slot in [slot for slot in self._packed if not self.holds(slot)]:
            self._drop(slot)

    def touch(self, slots: Iterable[int], step: int) -> None:
        for slot in slots:
            if slot in self._packed:
                self._packed[slot].last_step = step

    def drop_idle(self, before: int, step: int) -> bool:
        """Drops adapters whose last step was earlier than `before`, to save computing idle tiles.

        Returns True if other adapters remain that do not run in `step`.
        """
        for slot in [slot for slot, entry in self._packed.items() if entry.last_step < before]:
            self._drop(slot)
        return any(entry.last_step < step for entry in self._packed.values())

    def pack(self, slot: int, step: int) -> bool:
        """Copies a slot's weights into tiles. Returns False if they do not fit, even after
        dropping every adapter that does not run in `step`.
        """
        needed = self.tiles_needed(slot)
        if needed > len(self._free):
            self.drop_idle(step, step)
        if needed > len(self._free):
            return False
        tiles, self._free = self._free[:needed], self._free[needed:]
        for layer in range(self._directory.rank.shape[1]):
            for index, (projection, _, outputs) in enumerate(self._group):
                self._write(slot, layer, index, projection, outputs, tiles)
        generation = int(self._directory.generation[slot])
        self._packed[slot] = _Packed(generation, self._rank(slot), tiles, step)
        return True

    def close_gap(self) -> bool:
        """Moves the last tile into the first gap. Returns False if there is no gap."""
        last, owner = max(
            ((tile, entry) for entry in self._packed.values() for tile in entry.tiles),
            key=lambda pair: pair[0],
            default=(-1, None),
        )
        if owner is None or not self._free or self._free[0] > last:
            return False
        gap = self._free[0]
        for matrix in (self._a, *self._b):
            matrix[:, gap] = matrix[:, last]
        owner.tiles[owner.tiles.index(last)] = gap
        self._free = sorted([*self._free[1:], last])
        return True

    def begin(self, rows: Mapping[int, Sequence[int]]) -> None:
        """Prepares a step. rows: slot → its rows of the batch, for slots that this pack holds."""
        chosen = [(self._packed[slot], own) for slot, own in rows.items() if slot in self._packed]
        self._count = 0
        if not chosen:
            return
        height = max(len(own) for _, own in chosen)
        self._count = 1 + max(tile for entry, _ in chosen for tile in entry.tiles)
        self._height = height
        gather = np.zeros((self._count, height), np.int64)
        # Row → its adapter's ranks, numbered over all tiles, and the row's position in its tiles.
        bags: dict[int, tuple[list[int], int]] = {}
        for entry, own in chosen:
            for tile in entry.tiles:
                gather[tile, : len(own)] = own
            ranks = [tile * TILE_RANK + rank for tile in entry.tiles for rank in range(TILE_RANK)]
            bags |= {row: (ranks[: entry.rank], position) for position, row in enumerate(own)}
        last = max(bags)
        sizes = [len(bags[row][0]) if row in bags else 0 for row in range(last + 1)]
        held = np.array([rank for row in sorted(bags) for rank in bags[row][0]])
        positions = np.array([bags[row][1] for row in sorted(bags)])
        positions = positions.repeat([s for s in sizes if s])
        self._rows = torch.from_numpy(gather.repeat(self._parts, 0).reshape(-1))
        self._bags = torch.from_numpy(held)
        self._bag_starts = torch.tensor([0, *np.cumsum(sizes)])
        self._picked = torch.from_numpy(self._elements(held, positions).reshape(-1))

    def _elements(
        self, ranks: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """[projections, ranks]: flat index of each rank's value in `add`'s product with A."""
        projections = np.arange(len(self._group))[:, None]
        tiles, within = np.divmod(ranks, TILE_RANK)
        width = len(self._group) * TILE_RANK // self._parts
        part, column = np.divmod(projections * TILE_RANK + within, width)
        blocks = tiles * self._parts + part
        if _A_FIRST[self._arena.dtype]:
            return np.asarray((blocks * width + column) * self._height + positions)
        return np.asarray((blocks * self._height + positions) * width + column)

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int) -> None:
        """Adds the deltas of the step's rows to y, in place."""
        if not self._count:
            return
        own = x.index_select(0, self._rows).view(-1, self._height, self._inputs)
        a = self._a[layer, : self._count].view(len(own), -1, self._inputs)
        if _A_FIRST[x.dtype]:
            shrunk = torch.bmm(a, own.transpose(1, 2))
        else:
            shrunk = torch.bmm(own, a.transpose(1, 2))
        weights = shrunk.view(-1).index_select(0, self._picked).view(len(self._group), -1)
        rows = len(self._bag_starts) - 1
        start = 0
        for index, (_, _, outputs) in enumerate(self._group):
            table = self._b[index][layer].view(-1, outputs)
            # scale_grad_by_freq, mode sum, sparse, weights, include_last_offset
            sums = torch.embedding_bag(
                table, self._bags, self._bag_starts, False, 0, False, weights[index], True
            )[0]
            y[:rows, start : start + outputs].add_(sums)
            start += outputs

    def check(self) -> None:
        """Asserts that each tile is either free or owned by one adapter."""
        tiles = [tile for entry in self._packed.values() for tile in entry.tiles]
        assert sorted(tiles + self._free) == list(range(self.capacity))

    def _rank(self, slot: int) -> int:
        return max(int(self._directory.rank[slot, :, index].max()) for index, _, _ in self._group)

    def _drop(self, slot: int) -> None:
        self._free = sorted(self._free + self._packed.pop(slot).tiles)

    def _write(
        self, slot: int, layer: int, index: int, projection: int, outputs: int, tiles: list[int]
    ) -> None:
        """Copies one projection of one layer into `tiles`. index: the projection's in the group."""
        rank = int(self._directory.rank[slot, layer, projection])
        scale = float(self._directory.scale[slot, layer, projection])
        a, b = matrices(
            self._directory, self._arena, slot, layer, projection, self._inputs, outputs
        )
        for nth, tile in enumerate(tiles):
            begin = nth * TILE_RANK
            used = min(max(rank - begin, 0), TILE_RANK)
            a_rows = self._a[layer, tile, index * TILE_RANK : (index + 1) * TILE_RANK]
            b_rows = self._b[index][layer, tile]
            a_rows[:used] = a[begin : begin + used]
            torch.mul(b[:, begin : begin + used].T, scale, out=b_rows[:used])
            if used < TILE_RANK:
                a_rows[used:] = 0
                b_rows[used:] = 0


def _allocate(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in huge pages if the OS has them: a step reads all tiles once, a fifth faster that
    way. The OS provides a page when a tile first uses it.
    """
    elements = math.prod(size)
    if not elements:
        return torch.empty(size, dtype=dtype)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # The OS has no huge pages.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
