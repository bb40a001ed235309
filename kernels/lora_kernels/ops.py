"""LoRA deltas in plain torch, chosen by the shape of the batch; on a GPU, see `lora.py`.

Many rows an adapter (prefill): two matmuls a projection (`matmuls.py`). Few (decode): tiles
(`tiles.py`), for adapters that stay in the batch. An adapter comes into the tiles in its second
step of few rows and leaves them when it has not run for some; what does not fit goes as with many.
"""

from collections.abc import Mapping, Sequence

import torch

from lora_kernels.matmuls import Matmuls, index_of
from lora_kernels.reference import Directory
from lora_kernels.tiles import TILE_RANK, TilePack

# Measured with a 12-layer, 768-wide model in bf16; the unit is one adapter of rank 30 by itself.
ALONE_COST, ALONE_RANK_COST = 0.8, 1 / 128
# Using tiles at all, each tile, and each row of a tile.
TILES_COST, TILE_COST, TILE_ROW_COST = 0.7, 0.12, 0.024
# Copying one tile takes about as long as computing it three times for nobody.
IDLE_STEPS_MAX = 4
# A step packs about this many (those of an adapter together), for the batch waits meanwhile.
TILES_PACKED_A_STEP = 16
# Above it, an adapter's own matmuls are large enough to be worth their overhead.
TILED_RANK_MAX = 128


class Lora:
    """One step at a time: `begin` with the rows' slots, then `add` for each layer and group.

    groups: for each launch, (index, inputs, outputs) of its projections, in the order in which
    their outputs lie in y. They share their input. On CPU the tiles take up to `tile_bytes_max`
    beside the arena; None: as much as the arena.
    """

    def __init__(
        self,
        directory: Directory,
        arena: torch.Tensor,
        groups: Sequence[Sequence[tuple[int, int, int]]],
        tile_bytes_max: int | None = None,
    ) -> None:
        self._directory = directory
        self._arena = arena
        self._groups = [tuple(group) for group in groups]
        self._matmuls = Matmuls(directory, arena, self._groups)
        self._packs: list[TilePack] = []
        if arena.device.type == "cpu":
            if tile_bytes_max is None:
                tile_bytes_max = arena.numel() * arena.element_size()
            self._packs = _share(directory, arena, self._groups, tile_bytes_max)
        self._step = 0
        self._row_slots: list[int] = []
        self._generations: list[int] = []
        self._settled = False
        self._few_before: set[int] = set()
        self._segments: list[tuple[int, torch.Tensor | slice]] = []

    def begin(self, row_slots: Sequence[int]) -> None:
        """row_slots: one slot a token row; 0 is the base model."""
        slots = list(row_slots)
        active = sorted(set(slots) - {0})
        generations = [int(self._directory.generation[slot]) for slot in active]
        same = slots == self._row_slots and generations == self._generations
        if same and self._settled:
            return
        self._row_slots, self._generations = slots, generations
        rows: dict[int, list[int]] = {slot: [] for slot in active}
        for row, slot in enumerate(slots):
            if slot:
                rows[slot].append(row)
        few = self._few(rows)
        tiled = self._arrange(few)
        for pack in self._packs:
            pack.begin({slot: rows[slot] for slot in tiled})
        self._segments = [
            (slot, index_of(own, self._arena.device))
            for slot, own in rows.items()
            if slot not in tiled
        ]

    def start(self, x: torch.Tensor, layer: int, group: int) -> None:
        """Before the base matmul of x; nothing can be done beside it on CPU."""

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None:
        """Adds the deltas to y [rows, outputs of the group], in place, before the bias."""
        if self._packs:
            self._packs[group].add(x, y, layer)
        for slot, rows in self._segments:
            self._matmuls.add(x, y, slot, rows, layer, group)

    def check(self) -> None:
        for pack in self._packs:
            pack.check()

    def _few(self, rows: Mapping[int, Sequence[int]]) -> list[int]:
        """The adapters to be tiled: all up to some number of rows, where the sum costs least."""
        if not self._packs:
            return []
        ranks = {slot: int(self._directory.rank[slot].max()) for slot in rows}
        small = {slot: len(own) for slot, own in rows.items() if ranks[slot] <= TILED_RANK_MAX}

        def cost(height: int) -> float:
            tiles = sum(
                -(-ranks[slot] // TILE_RANK) for slot, own in small.items() if own <= height
            )
            alone = sum(
                ALONE_COST + ranks[slot] * ALONE_RANK_COST
                for slot, own in small.items()
                if own > height
            )
            return alone + (tiles and TILES_COST + tiles * (TILE_COST + height * TILE_ROW_COST))

        best = min(sorted({0, *small.values()}), key=cost)
        return [slot for slot, own in small.items() if own <= best]

    def _arrange(self, few: list[int]) -> set[int]:
        """Brings tiles up to date; gives the adapters that can be run from them."""
        if not self._packs:
            return set()
        for pack in self._packs:
            pack.drop_stale()
        if few:
            self._step += 1
            for pack in self._packs:
                pack.touch(few, self._step)
        budget = TILES_PACKED_A_STEP
        tiled: set[int] = set()
        self._settled = True
        for slot in few:
            missing = [pack for pack in self._packs if not pack.holds(slot)]
            needed = sum(pack.tiles_needed(slot) for pack in missing)
            if missing and (slot not in self._few_before or budget <= 0):
                self._settled = False
            elif all(pack.pack(slot, self._step) for pack in missing):
                tiled.add(slot)
                budget -= needed
        self._few_before = set(few)
        for pack in self._packs:
            idle = pack.drop_idle(self._step - IDLE_STEPS_MAX, self._step)
            while (gap := pack.close_gap()) and budget > 0:
                budget -= 1
            self._settled = self._settled and not idle and not gap
        return tiled


def _share(
    directory: Directory,
    arena: torch.Tensor,
    groups: Sequence[Sequence[tuple[int, int, int]]],
    bytes_max: int,
) -> list[TilePack]:
    """One pack a group, so that what an adapter leaves alone takes and costs nothing."""
    widths = [sum(inputs + outputs for _, inputs, outputs in group) for group in groups]
    return [
        TilePack(directory, arena, group, bytes_max * width // sum(widths))
        for group, width in zip(groups, widths, strict=True)
    ]
