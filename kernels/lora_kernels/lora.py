"""LoRA deltas on a GPU: shrink (x · A) and expand (· B, added to y), two Triton launches a group.
Of gate and up the second one also applies the activation, so that y is read once and not written.

Both work through one table of row tiles (`segments.py`) and read offsets, rank and scale from a
copy of the directory, so that what a launch computes is data: a captured CUDA graph follows other
batches and other adapters. A grid is as large as the largest batch of its size needs, up to
`Tiling.programs`; programs loop over the tiles there are.

Shrink sums over pieces of the inputs in programs of their own, each into a plane of its own, and
expand adds the planes up: no atomics, so the same batch gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels import fused, segments
from lora_kernels.delta_kernels import expand_kernel, gated_kernel, shrink_kernel
from lora_kernels.device_tables import DeviceDirectory, DeviceTable, event, offset_unit
from lora_kernels.launching import Launcher
from lora_kernels.matmuls import Matmuls, gained_rows, index_of
from lora_kernels.reference import Directory
from lora_kernels.tilings import TILINGS, WIDE_ROWS, Choice, Tiling
from lora_kernels.vocabulary import Vocabulary

# A step of up to so many rows that is not captured waits for the host to launch it, so its shrinks
# have no stream of their own, which takes two events a group. On an H200, with an 8B model, a step
# of 576 rows was 10% faster in line; one of 1,024 waits for the device.
HOST_BOUND_ROWS = 640
# One adapter alone in a step of more rows is computed by torch's matmuls, for its tiles are too few
# to fill the device; in a smaller one by the kernels, for 8 launches a layer cost less than 14.
ALONE_ROWS = 512
_CPU = torch.device("cpu")


class TritonLora:
    """One step at a time: `begin`; then, for each layer and group, `start` before the base matmul
    (or not at all) and `add` after it, or `add_gated` for gate and up.

    All that the kernels read or write beside x and y lies in buffers that `reserve` makes, once and
    before any graph is captured: a graph captured after one `begin` is replayed after another with
    other rows, adapters and ranks, padded to the same number of rows.

    groups: as for `ops.Lora`; a group's projections follow each other in the directory, three at
    most. overlap: `start` shrinks on a stream of its own, beside the base matmul, unless a step
    waits for the host anyway; it may be turned off between steps.
    """

    def __init__(
        self,
        directory: Directory,
        arena: torch.Tensor,
        groups: Sequence[Sequence[tuple[int, int, int]]],
        rank_max: int = 256,
        *,
        overlap: bool = True,
        tilings: Sequence[Choice] = TILINGS,
    ) -> None:
        for group in groups:
            assert len(group) <= 3
            assert [index for index, _, _ in group] == [group[0][0] + i for i in range(len(group))]
        self._arena = arena
        self._groups = [tuple(group) for group in groups]
        self._rank_max = rank_max
        self.overlap = overlap
        self._tilings = tuple(tilings)
        self._unit = offset_unit(groups)
        self._directory = directory
        self._followed = DeviceDirectory(directory, arena.device, self._unit, rank_max)
        self._matmuls = Matmuls(directory, arena, self._groups)
        self.vocabulary = Vocabulary(directory, arena)
        self.gained: torch.Tensor | None = None
        self._side: torch.cuda.Stream | None = None
        if arena.is_cuda:
            self._side = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]
            self._forked, self._joined = event(), event()
        self._rows_max = 0
        self._reserved = False
        # What `begin` decides for `start` and `add`.
        self._begun: tuple[list[int], list[int], int | None] | None = None
        self._alone: tuple[int, slice] | None = None
        self._host_bound = False
        self._tiling = self._tilings[0].tiling
        self._cuts: list[_Cut] = []
        self._tiles = self._base_tiles = self._blocks = 0
        self._started: tuple[int, int] | None = None

    def reserve(self, rows_max: int) -> None:
        """Memory for batches of up to `rows_max` rows, padding included; not to be called again
        where graphs are captured. Without it, memory grows with the batches.
        """
        self._reserved = True
        self._allocate(rows_max)

    def _allocate(self, rows_max: int) -> None:
        slots = len(self._directory.generation)
        heights = [choice.tiling.rows for choice in self._tilings]
        self._tiles_max = segments.tiles_max(rows_max, slots, min(heights))
        self._table = DeviceTable(segments.rows_at(self._tiles_max) + rows_max, self._arena.device)
        # One row of planes has room for each projection of a group at the highest rank.
        self._row = max(map(len, self._groups)) * self._rank_max
        constants = {
            "LAYERS": self._directory.rank.shape[1],
            "PROJECTIONS": self._directory.rank.shape[2],
            "UNIT": self._unit,
            "ROWS_AT": segments.rows_at(self._tiles_max),
            "ROW": self._row,
            "RANK_MAX": self._rank_max,
            "PRECISION": "ieee" if self._arena.dtype == torch.float32 else "tf32",
        }
        self._tiled: list[tuple[Choice, list[_Cut]]] = []
        held: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}
        for choice in self._tilings:
            tiling = choice.tiling
            rows = rows_max if choice.rows_max is None else min(choice.rows_max, rows_max)
            planes = max(tiling.planes(group[0][1]) for group in self._groups)
            dtype = self._arena.dtype if tiling.rows >= WIDE_ROWS else torch.float32
            assert dtype == torch.float32 or planes == 1
            size = (planes, rows, self._row)
            if (size, dtype) not in held:
                held[size, dtype] = torch.empty(size, dtype=dtype, device=self._arena.device)
            memory = held[size, dtype]
            cuts = [_Cut.of(group, tiling, memory, constants) for group in self._groups]
            self._tiled.append((choice, cuts))
        self._rows_max = rows_max
        self._begun = None

    def begin(self, row_slots: Sequence[int], rows: int | None = None) -> None:
        """row_slots: one slot a token row; 0 is the base model. rows: what a CUDA graph pads them
        to, whose grids then depend on that alone; None: launches are as small as the batch allows.
        """
        padded = len(row_slots) if rows is None else rows
        assert len(row_slots) <= padded
        if padded > self._rows_max:
            assert not self._reserved, "more rows than reserved"
            self._allocate(1 << (padded - 1).bit_length())
        slots = list(row_slots)
        self.vocabulary.begin(slots)
        self.gained = gained_rows(self._directory, slots, self._arena)
        active = sorted(set(slots) - {0})
        generations = [int(self._directory.generation[slot]) for slot in active]
        self._started = None
        if (slots, generations, rows) == self._begun:
            return
        self._begun = slots, generations, rows
        self._followed.follow(active)
        self._host_bound = rows is None and padded <= HOST_BOUND_ROWS
        highest = self._rank_max
        if rows is None:
            highest = max((int(self._followed.highest[slot]) for slot in active), default=0)
        self._tiling, self._cuts = next(
            (choice.tiling, cuts) for choice, cuts in self._tiled if choice.suits(padded, highest)
        )
        many = rows is None and padded > ALONE_ROWS
        self._alone = self._run_of_one(slots, active) if many else None
        if self._alone is not None:
            return
        table = self._table.next()
        used = segments.fill(
            table,
            slots + [0] * (padded - len(slots)),
            self._followed.highest,
            self._tiles_max,
            self._tiling.rows,
            self._tiling.ranks,
        )
        self._table.send(used)
        self._tiles, self._blocks, tiles = (int(value) for value in table[:3])
        self._base_tiles = tiles - self._tiles
        if rows is not None:
            count = len(self._directory.generation)
            self._tiles = segments.tiles_max(rows, count, self._tiling.rows) - 1
            self._base_tiles = 1
            self._blocks = -(-self._rank_max // self._tiling.ranks)

    def start(self, x: torch.Tensor, layer: int, group: int) -> None:
        """x [rows, inputs] must stay as it is until `add` has been called with it."""
        if not self.overlap or self._host_bound or self._alone is not None or not self._tiles:
            return
        self._started = layer, group
        if self._side is None:
            self._shrink(x, layer, group)
            return
        self._forked.record()
        self._side.wait_event(self._forked)
        with torch.cuda.stream(self._side):
            self._shrink(x, layer, group)
            self._joined.record()

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None:
        """Adds the deltas to y [rows, outputs of the group], in place, before the bias."""
        if self._alone is not None:
            slot, run = self._alone
            self._matmuls.add(x, y, slot, run, layer, group)
            return
        if not self._tiles:
            return
        self._finish_shrink(x, layer, group)
        self._expand(y, layer, group)

    def add_gated(
        self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int, gelu: bool = False
    ) -> torch.Tensor:
        """`add` for gate and up, then `fused.silu_mul` or `fused.gelu_mul` of y, whose values are
        then undefined.
        """
        if self._alone is not None or not self._tiles:
            self.add(x, y, layer, group)
            return fused.gelu_mul(y) if gelu else fused.silu_mul(y)
        self._finish_shrink(x, layer, group)
        cut = self._cuts[group]
        out = y.new_empty(len(y), cut.outputs // 2)
        parts = cut.expand_parts // 2
        gated = cut.gated_gelu if gelu else cut.gated
        gated[parts, _workers(self._tiles + self._base_tiles, parts, self._tiling.programs)](
            y,
            y.stride(0),
            out,
            *self._b(cut),
            layer,
        )
        return out

    def _finish_shrink(self, x: torch.Tensor, layer: int, group: int) -> None:
        if self._started is None:
            self._shrink(x, layer, group)
            return
        assert self._started == (layer, group), "start and add of different matmuls"
        self._started = None
        if self._side is not None:
            torch.cuda.current_stream().wait_event(self._joined)

    def check(self) -> None:
        self._followed.check()

    def _run_of_one(self, slots: list[int], active: list[int]) -> tuple[int, slice] | None:
        """The one adapter of a batch and its rows, if they follow each other."""
        adapters = [slot for slot in active if self._followed.highest[slot]]
        if len(adapters) != 1:
            return None
        rows = index_of([r for r, slot in enumerate(slots) if slot == adapters[0]], _CPU)
        return (adapters[0], rows) if isinstance(rows, slice) else None

    def _shrink(self, x: torch.Tensor, layer: int, group: int) -> None:
        cut = self._cuts[group]
        assert x.shape[1] == cut.inputs and x.stride(1) == 1 and x.dtype == self._arena.dtype
        work = self._tiles * self._blocks * (self._tiling.rows // self._tiling.shrink_rows)
        workers = _workers(work, cut.shrink_parts, self._tiling.programs)
        cut.shrink[cut.shrink_parts, workers](
            x,
            x.stride(0),
            self._arena,
            cut.planes,
            self._table.values,
            self._followed.offsets,
            self._followed.ranks,
            layer,
        )

    def _b(self, cut: "_Cut") -> tuple[torch.Tensor, ...]:
        """What a launch reads to multiply with B."""
        followed = self._followed
        tables = followed.offsets, followed.ranks, followed.scales
        return self._arena, cut.planes, self._table.values, *tables

    def _expand(self, y: torch.Tensor, layer: int, group: int) -> None:
        cut = self._cuts[group]
        assert y.shape[1] == cut.outputs and y.stride(1) == 1
        workers = _workers(self._tiles, cut.expand_parts, self._tiling.programs)
        cut.expand[cut.expand_parts, workers](
            y,
            y.stride(0),
            *self._b(cut),
            layer,
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is alike in a group's launches with one tiling. parts: programs that share no work."""

    inputs: int
    outputs: int
    planes: torch.Tensor
    shrink_parts: int
    expand_parts: int
    shrink: Launcher
    expand: Launcher
    gated: Launcher
    gated_gelu: Launcher

    @classmethod
    def of(
        cls,
        group: Sequence[tuple[int, int, int]],
        tiling: Tiling,
        planes: torch.Tensor,
        shared: dict[str, object],
    ) -> "_Cut":
        first, inputs, _ = group[0]
        outputs = [width for _, _, width in group]
        shared = shared | {
            "FIRST": first,
            "PLANES": tiling.planes(inputs),
            "PLANE_ROWS": planes.shape[1],
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
        }
        expand = shared | {
            "BLOCK_ROWS": tiling.rows,
            "BLOCK_OUTPUTS": tiling.outputs,
            "DEPTH": tiling.depth,
        }
        return cls(
            inputs,
            sum(outputs),
            planes,
            tiling.planes(inputs) * len(group),
            sum(-(-width // tiling.outputs) for width in outputs),
            shrink_kernel.bound(
                INPUTS=inputs,
                PLANE_STEP=tiling.plane_step(inputs),
                CUTS=tiling.rows // tiling.shrink_rows,
                BLOCK_ROWS=tiling.shrink_rows,
                BLOCK_RANKS=tiling.ranks,
                BLOCK_INPUTS=tiling.inputs,
                **shared,
            ),
            expand_kernel.bound(
                **{f"OUTPUTS_{i}": width for i, width in enumerate([*outputs, 0, 0][:3])},
                **expand,
            ),
            gated_kernel.bound(INNER=outputs[0], GELU=False, **expand),
            gated_kernel.bound(INNER=outputs[0], GELU=True, **expand),
        )


def _workers(work: int, parts: int, programs: int) -> int:
    """Programs that share the work, for each part of a group's inputs or outputs."""
    return max(1, min(work, programs // parts))
