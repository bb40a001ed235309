"""LoRA deltas in plain torch, by matmuls or tiles depending on the batch; `lora.py` is for GPUs.

An adapter with many rows (prefill) takes two matmuls a projection (`matmuls.py`). An adapter with
few rows (decode) runs from tiles (`tiles.py`). It is packed into tiles in its second consecutive
step of few rows, and dropped after IDLE_STEPS_MAX steps without rows. An adapter that does not fit
into the tiles, or that has gains (DoRA), takes matmuls.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from lora_kernels.matmuls import Matmuls, gained_rows, index_of
from lora_kernels.reference import Directory
from lora_kernels.tiles import TILE_RANK, TilePack
from lora_kernels.vocabulary import Vocabulary

# Costs of one adapter's matmuls: fixed, and per rank. Measured with a 12-layer, 768-wide model in
# bf16; the unit is the cost of a rank-30 adapter.
MATMULS_COST, MATMULS_RANK_COST = 0.8, 1 / 128
# Costs of tiles: fixed, per tile, and per row of a tile.
TILES_COST, TILE_COST, TILE_ROW_COST = 0.7, 0.12, 0.024
# Copying a tile takes about as long as computing an idle one three times.
IDLE_STEPS_MAX = 4
# A step packs about this many tiles, never splitting an adapter, since packing delays the batch.
TILES_PACKED_A_STEP = 16
# At higher ranks, an adapter's matmuls are large enough to outweigh their overhead.
TILED_RANK_MAX = 128


class Lora:
    """Adds the deltas of one step at a time: `begin` with the rows' slots, then `add` for each
    layer and group.

    groups: for each launch, (index, inputs, outputs) of its projections, in the order of their
    outputs in y. The projections of a group share their input. tile_bytes_max: memory for tiles on
    a CPU, in addition to the arena; None: as much as the arena.
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
        self.vocabulary = Vocabulary(directory, arena)
        self.gained: torch.Tensor | None = None
        self._packs: list[TilePack] = []
        if arena.device.type == "cpu":
            if tile_bytes_max is None:
                tile_bytes_max = arena.numel() * arena.element_size()
            self._packs = _tile_packs(directory, arena, self._groups, tile_bytes_max)
        self._step = 0
        self._row_slots: list[int] = []
        self._generations: list[int] = []
        # True if another step with the same rows would arrange the same tiles.
        self._stable = False
        self._few_before: set[int] = set()
        self._segments: list[tuple[int, torch.Tensor | slice]] = []

    def begin(self, row_slots: Sequence[int]) -> None:
        """row_slots: one slot a token row; 0 is the base model."""
        slots = list(row_slots)
        self.vocabulary.begin(slots)
        self.gained = gained_rows(self._directory, slots, self._arena)
        active = sorted(set(slots) - {0})
        generations = [int(self._directory.generation[slot]) for slot in active]
        same = slots == self._row_slots and generations == self._generations
        if same and self._stable:
            return
        self._row_slots, self._generations = slots, generations
        rows: dict[int, list[int]] = {slot: [] for slot in active}
        for row, slot in enumerate(slots):
            if slot:
                rows[slot].append(row)
        few = self._few_row_slots(rows)
        tiled = self._arrange(few)
        for pack in self._packs:
            pack.begin({slot: rows[slot] for slot in tiled})
        self._segments = [
            (slot, index_of(own, self._arena.device))
            for slot, own in rows.items()
            if slot not in tiled
        ]

    def start(self, x: torch.Tensor, layer: int, group: int) -> None:
        """Called before the base matmul of x. Does nothing: a CPU has no second stream."""

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None:
        """Adds the deltas to y [rows, outputs of the group], in place, before the bias."""
        if self._packs:
            self._packs[group].add(x, y, layer)
        for slot, rows in self._segments:
            self._matmuls.add(x, y, slot, rows, layer, group)

    def add_gated(
        self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int, gelu: bool = False
    ) -> torch.Tensor:
        """`add` for gate and up, then `silu_mul` or `gelu_mul` of y, whose values are then
        undefined.
        """
        self.add(x, y, layer, group)
        return gelu_mul(y) if gelu else silu_mul(y)

    def check(self) -> None:
        for pack in self._packs:
            pack.check()

    def _few_row_slots(self, rows: Mapping[int, Sequence[int]]) -> list[int]:
        """The slots to tile: those of at most n rows, for the n with the least total cost."""
        if not self._packs:
            return []
        gained = self._directory.gained
        ranks = {slot: int(self._directory.rank[slot].max()) for slot in rows}
        small = {
            slot: len(own)
            for slot, own in rows.items()
            if ranks[slot] <= TILED_RANK_MAX and slot not in gained
        }

        def cost(height: int) -> float:
            tiles = sum(
                -(-ranks[slot] // TILE_RANK) for slot, own in small.items() if own <= height
            )
            matmuls = sum(
                MATMULS_COST + ranks[slot] * MATMULS_RANK_COST
                for slot, own in small.items()
                if own > height
            )
            return matmuls + (tiles and TILES_COST + tiles * (TILE_COST + height * TILE_ROW_COST))

        best = min(sorted({0, *small.values()}), key=cost)
        return [slot for slot, own in small.items() if own <= best]

    def _arrange(self, few: list[int]) -> set[int]:
        """Drops and packs tiles for this step. Returns the slots that can run from tiles."""
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
        self._stable = True
        for slot in few:
            missing = [pack for pack in self._packs if not pack.holds(slot)]
            needed = sum(pack.tiles_needed(slot) for pack in missing)
            if missing and (slot not in self._few_before or budget <= 0):
                self._stable = False
            elif all(pack.pack(slot, self._step) for pack in missing):
                tiled.add(slot)
                budget -= needed
        self._few_before = set(few)
        for pack in self._packs:
            idle = pack.drop_idle(self._step - IDLE_STEPS_MAX, self._step)
            while (gap := pack.close_gap()) and budget > 0:
                budget -= 1
            self._stable = self._stable and not idle and not gap
        return tiled


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2 · inner], gate then up → [rows, inner]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul`, by GELU in its approximation with tanh."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def _tile_packs(
    directory: Directory,
    arena: torch.Tensor,
    groups: Sequence[Sequence[tuple[int, int, int]]],
    bytes_max: int,
) -> list[TilePack]:
    """One pack a group: a group that an adapter does not target takes no tiles and no time.

    Divides `bytes_max` between the groups in proportion to their inputs and outputs.
    """
    widths = [sum(inputs + outputs for _, inputs, outputs in group) for group in groups]
    return [
        TilePack(directory, arena, group, bytes_max * width // sum(widths))
        for group, width in zip(groups, widths, strict=True)
    ]
