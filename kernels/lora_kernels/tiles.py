"""LoRA for few rows an adapter, on CPU: a batched matmul over tiles of 16 ranks, a weighted sum.

A decode step has a row or two an adapter, and sixteen adapters are 2,688 matmuls of next to nothing
over twelve layers; their overhead, not their bytes, is what costs. So the weights of the adapters
in the batch are kept a second time, cut into tiles of 16 ranks:

    a [layers, tiles, projections · 16, in]      b, one a projection: [layers, tiles, 16, out]

and one launch is: rows gathered by tile, one batched matmul with A, and for each projection and row
the sum of B's rows weighted by what came out (an `embedding_bag`: B has a row for each rank).
Ranks are filled up to 16 with zeros. B holds the scale. A tile computes only rows of its own
adapter, or a row that nobody reads: whatever an adapter's weights are, other rows never see them.
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
# Which way round the product with A goes: MKL is a third faster so, oneDNN the other way.
_A_FIRST = {torch.float32: True, torch.bfloat16: False, torch.float16: False}


@dataclass(slots=True)
class _Packed:
    """generation: of the slot when its weights were copied. wanted: the step it last ran in."""

    generation: int
    rank: int
    tiles: list[int]
    wanted: int


class TilePack:
    """The tiles of one group of projections: (index, inputs, outputs) each, with one input."""

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
        # oneDNN needs twice as long for 48 columns as for three times 16; for 32 it does not.
        split = len(group) == 3 and not _A_FIRST[arena.dtype]
        self._parts = len(group) if split else 1
        self._packed: dict[int, _Packed] = {}
        self._free = list(range(self.capacity))
        # What `begin` prepares for `add`.
        self._rows = torch.empty(0, dtype=torch.int64)
        self._picked = torch.empty(0, dtype=torch.int64)
        self._bags = torch.empty(0, dtype=torch.int64)
        self._bag_starts = torch.empty(0, dtype=torch.int64)
        self._count = 0
        self._height = 0

    def tiles_needed(self, slot: int) -> int:
        return -(-self._rank(slot) // TILE_RANK)

    def holds(self, slot: int) -> bool:
        """Whether the slot's present weights are here; an adapter without any is, trivially."""
        entry = self._packed.get(slot)
        if entry is None:
            return self._rank(slot) == 0
        return entry.generation == int(self._directory.generation[slot])

    def drop_stale(self) -> None:
        """What was cleared, placed anew or moved since it was packed leaves."""
        for slot in [slot for slot in self._packed if not self.holds(slot)]:
            self._drop(slot)

    def touch(self, slots: Iterable[int], step: int) -> None:
        for slot in slots:
            if slot in self._packed:
                self._packed[slot].wanted = step

    def drop_idle(self, before: int, step: int) -> bool:
        """What last ran before that step leaves, for its tiles would be computed for nobody.

        True while something else stays that does not run in `step`.
        """
        for slot in [slot for slot, entry in self._packed.items() if entry.wanted < before]:
            self._drop(slot)
        return any(entry.wanted < step for entry in self._packed.values())

    def pack(self, slot: int, step: int) -> bool:
        """False when there is no room, though all that does not run in `step` has left."""
        needed = self.tiles_needed(slot)
        if needed > len(self._free):
            self.drop_idle(step, step)
        if needed > len(self._free):
            return False
        tiles, self._free = self._free[:needed], self._free[needed:]
        for layer in range(self._directory.rank.shape[1]):
            for place, (projection, _, outputs) in enumerate(self._group):
                self._write(slot, layer, place, projection, outputs, tiles)
        generation = int(self._directory.generation[slot])
        self._packed[slot] = _Packed(generation, self._rank(slot), tiles, step)
        return True

    def close_gap(self) -> bool:
        """Moves the last tile into the first gap; False when there is none."""
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
        """rows: slot → its rows of the batch, for slots that are held here."""
        chosen = [(self._packed[slot], own) for slot, own in rows.items() if slot in self._packed]
        self._count = 0
        if not chosen:
            return
        height = max(len(own) for _, own in chosen)
        self._count = 1 + max(tile for entry, _ in chosen for tile in entry.tiles)
        self._height = height
        gather = np.zeros((self._count, height), np.int64)
        # For each row: its ranks, of all tiles, and its place in them.
        bags: dict[int, tuple[list[int], int]] = {}
        for entry, own in chosen:
            for tile in entry.tiles:
                gather[tile, : len(own)] = own
            ranks = [tile * TILE_RANK + rank for tile in entry.tiles for rank in range(TILE_RANK)]
            bags |= {row: (ranks[: entry.rank], place) for place, row in enumerate(own)}
        last = max(bags)
        sizes = [len(bags[row][0]) if row in bags else 0 for row in range(last + 1)]
        held = np.array([rank for row in sorted(bags) for rank in bags[row][0]])
        places = np.array([bags[row][1] for row in sorted(bags)]).repeat([s for s in sizes if s])
        self._rows = torch.from_numpy(gather.repeat(self._parts, 0).reshape(-1))
        self._bags = torch.from_numpy(held)
        self._bag_starts = torch.tensor([0, *np.cumsum(sizes)])
        self._picked = torch.from_numpy(self._elements(held, places).reshape(-1))

    def _elements(
        self, ranks: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """[projections, ranks]: where what A gives lies in the product (see `add`)."""
        projections = np.arange(len(self._group))[:, None]
        tiles, within = np.divmod(ranks, TILE_RANK)
        width = len(self._group) * TILE_RANK // self._parts
        part, column = np.divmod(projections * TILE_RANK + within, width)
        blocks = tiles * self._parts + part
        if _A_FIRST[self._arena.dtype]:
            return np.asarray((blocks * width + column) * self._height + places)
        return np.asarray((blocks * self._height + places) * width + column)

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int) -> None:
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
        for place, (_, _, outputs) in enumerate(self._group):
            table = self._b[place][layer].view(-1, outputs)
            # scale_grad_by_freq, mode sum, sparse, weights, include_last_offset
            sums = torch.embedding_bag(
                table, self._bags, self._bag_starts, False, 0, False, weights[place], True
            )[0]
            y[:rows, start : start + outputs].add_(sums)
            start += outputs

    def check(self) -> None:
        """No tile has two owners, and none is lost."""
        tiles = [tile for entry in self._packed.values() for tile in entry.tiles]
        assert sorted(tiles + self._free) == list(range(self.capacity))

    def _rank(self, slot: int) -> int:
        return max(int(self._directory.rank[slot, :, index].max()) for index, _, _ in self._group)

    def _drop(self, slot: int) -> None:
        self._free = sorted(self._free + self._packed.pop(slot).tiles)

    def _write(
        self, slot: int, layer: int, place: int, projection: int, outputs: int, tiles: list[int]
    ) -> None:
        rank = int(self._directory.rank[slot, layer, projection])
        scale = float(self._directory.scale[slot, layer, projection])
        a, b = matrices(
            self._directory, self._arena, slot, layer, projection, self._inputs, outputs
        )
        for index, tile in enumerate(tiles):
            begin = index * TILE_RANK
            used = min(max(rank - begin, 0), TILE_RANK)
            rows = self._a[layer, tile, place * TILE_RANK : (place + 1) * TILE_RANK]
            columns = self._b[place][layer, tile]
            rows[:used] = a[begin : begin + used]
            torch.mul(b[:, begin : begin + used].T, scale, out=columns[:used])
            if used < TILE_RANK:
                rows[used:] = 0
                columns[used:] = 0


def _allocate(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in huge pages, where there are any: a step reads all of it once, which is a fifth
    faster so. What no tile has used yet costs nothing.
    """
    elements = math.prod(size)
    if not elements:
        return torch.empty(size, dtype=dtype)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # The kernel has none.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
