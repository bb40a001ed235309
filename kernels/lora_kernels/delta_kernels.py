"""Triton's side of `lora.py`: A and B read where the directory says, rows where the table says."""

import triton
import triton.language as tl

from lora_kernels import segments
from lora_kernels.device_tables import ENTRY, RANK, SCALE
from lora_kernels.fused import activated
from lora_kernels.launching import Launcher

_ENTRY = tl.constexpr(ENTRY)
_RANK = tl.constexpr(RANK)
_SCALE = tl.constexpr(SCALE)
_HEADER = tl.constexpr(segments.HEADER)
_TILE_FIELDS = tl.constexpr(segments.TILE_FIELDS)
# Ranks that B is read by at once where its rows allow it: 16 bytes in bf16.
_RANK_UNIT = tl.constexpr(8)


@Launcher
@triton.jit(do_not_specialize=["layer"])
def shrink_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    ranks: tl.tensor,
    layer: tl.tensor,
    LAYERS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    FIRST: tl.constexpr,
    INPUTS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS_AT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_STEP: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    ROW: tl.constexpr,
    RANK_MAX: tl.constexpr,
    CUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """planes [PLANES, PLANE_ROWS, ROW] = rows of x · A. Grid: (planes · the group's projections,
    programs that share the tiles, each cut into `CUTS` of `BLOCK_ROWS` rows, and blocks of ranks).
    `FIRST`: the group's first projection.
    """
    piece = tl.program_id(0) // PLANES
    plane = tl.program_id(0) % PLANES
    tiles = tl.load(table)
    blocks = tl.load(table + 1)
    for work in range(tl.program_id(1), tiles * CUTS * blocks, tl.num_programs(1)):
        tile = table + _HEADER + work // (CUTS * blocks) * _TILE_FIELDS
        block = work % blocks * BLOCK_RANKS
        slot = tl.load(tile)
        first = tl.load(tile + 1) + work // blocks % CUTS * BLOCK_ROWS
        end = tl.load(tile + 2)
        entry = (slot * LAYERS + layer) * PROJECTIONS + FIRST + piece
        rank = tl.load(ranks + entry * _ENTRY + _RANK)
        if (block < rank) & (first < end):
            # Offsets are kept in units, so that the compiler knows what they are multiples of.
            a = arena + tl.load(offsets + entry * (_ENTRY // 2)) * UNIT
            place = first + tl.arange(0, BLOCK_ROWS)
            live = place < end
            row = tl.load(table + ROWS_AT + place, mask=live, other=0).to(tl.int64)
            r = block + tl.arange(0, BLOCK_RANKS)
            used = r < rank
            k = tl.arange(0, BLOCK_INPUTS)
            x_at = x + row[:, None] * x_stride + k[None, :]
            a_at = a + r[None, :] * INPUTS + k[:, None]
            total = tl.zeros([BLOCK_ROWS, BLOCK_RANKS], tl.float32)
            begin = plane * PLANE_STEP
            for at in range(begin, tl.minimum(begin + PLANE_STEP, INPUTS), BLOCK_INPUTS):
                if INPUTS % BLOCK_INPUTS == 0:
                    x_tile = tl.load(x_at + at, mask=live[:, None], other=0.0)
                    a_tile = tl.load(a_at + at, mask=used[None, :], other=0.0)
                else:
                    inside = at + k < INPUTS
                    x_tile = tl.load(x_at + at, mask=live[:, None] & inside[None, :], other=0.0)
                    a_tile = tl.load(a_at + at, mask=used[None, :] & inside[:, None], other=0.0)
                total = tl.dot(x_tile, a_tile, total, input_precision=PRECISION)
            target = planes + (plane * PLANE_ROWS + place)[:, None] * ROW
            target += piece * RANK_MAX + r[None, :]
            mask = live[:, None] & used[None, :]
            tl.store(target, total.to(planes.dtype.element_ty), mask=mask)


@Launcher
@triton.jit(do_not_specialize=["layer"])
def expand_kernel(
    y: tl.tensor,
    y_stride: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    layer: tl.tensor,
    LAYERS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    FIRST: tl.constexpr,
    OUTPUTS_0: tl.constexpr,
    OUTPUTS_1: tl.constexpr,
    OUTPUTS_2: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS_AT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    ROW: tl.constexpr,
    RANK_MAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y[rows] += scale · (sum of planes) · B, then times the gain if there is one, in place. Grid:
    (blocks of each projection's outputs, one projection after the other, programs that share the
    tiles).
    """
    BLOCKS_0: tl.constexpr = (OUTPUTS_0 + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    BLOCKS_1: tl.constexpr = (OUTPUTS_1 + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    block = tl.program_id(0)
    second = (block >= BLOCKS_0).to(tl.int32)
    third = (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    piece = second + third
    begin = second * OUTPUTS_0 + third * OUTPUTS_1
    end = OUTPUTS_0 + second * OUTPUTS_1 + third * OUTPUTS_2
    n = (block - second * BLOCKS_0 - third * BLOCKS_1) * BLOCK_OUTPUTS
    n += tl.arange(0, BLOCK_OUTPUTS)
    inside = n < end - begin
    tiles = tl.load(table)
    for work in range(tl.program_id(1), tiles, tl.num_programs(1)):
        tile = table + _HEADER + work * _TILE_FIELDS
        slot = tl.load(tile)
        entry = (slot * LAYERS + layer) * PROJECTIONS + FIRST + piece
        rank = tl.load(ranks + entry * _ENTRY + _RANK)
        if rank > 0:
            place = tl.load(tile + 1) + tl.arange(0, BLOCK_ROWS)
            live = place < tl.load(tile + 2)
            row = tl.load(table + ROWS_AT + place, mask=live, other=0).to(tl.int64)
            y_at = y + row[:, None] * y_stride + begin + n[None, :]
            mask = live[:, None] & inside[None, :]
            # Before the product, which waits for more.
            base = tl.load(y_at, mask=mask, other=0.0)
            delta = _delta(
                planes + place * ROW + piece * RANK_MAX, live, n, inside, entry, rank,
                arena, offsets, scales, UNIT, PLANES, PLANE_ROWS * ROW,
                BLOCK_ROWS, BLOCK_OUTPUTS, DEPTH, PRECISION,
            )  # fmt: skip
            added = base.to(tl.float32) + delta
            added = _gained(added, n, inside, end - begin, entry, arena, offsets, UNIT)
            tl.store(y_at, added.to(y.dtype.element_ty), mask=mask)


@Launcher
@triton.jit(do_not_specialize=["layer"])
def gated_kernel(
    y: tl.tensor,
    y_stride: tl.tensor,
    out: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    layer: tl.tensor,
    LAYERS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    FIRST: tl.constexpr,
    INNER: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS_AT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    ROW: tl.constexpr,
    RANK_MAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """out = activation(gate) · up of all rows, where gate and up are y's halves with their deltas,
    each rounded to y's type, as if expand had written them. Grid: (blocks of `INNER`, programs that
    share the tiles, those of rows without an adapter included).
    """
    n = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inside = n < INNER
    tiles = tl.load(table + 2)
    for work in range(tl.program_id(1), tiles, tl.num_programs(1)):
        tile = table + _HEADER + work * _TILE_FIELDS
        slot = tl.load(tile)
        place = tl.load(tile + 1) + tl.arange(0, BLOCK_ROWS)
        live = place < tl.load(tile + 2)
        row = tl.load(table + ROWS_AT + place, mask=live, other=0).to(tl.int64)
        y_at = y + row[:, None] * y_stride + n[None, :]
        mask = live[:, None] & inside[None, :]
        gate = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(y_at + INNER, mask=mask, other=0.0).to(tl.float32)
        entry = (slot * LAYERS + layer) * PROJECTIONS + FIRST
        shrunk = planes + place * ROW
        rank = tl.load(ranks + entry * _ENTRY + _RANK)
        if rank > 0:
            gate += _delta(
                shrunk, live, n, inside, entry, rank,
                arena, offsets, scales, UNIT, PLANES, PLANE_ROWS * ROW,
                BLOCK_ROWS, BLOCK_OUTPUTS, DEPTH, PRECISION,
            )  # fmt: skip
            gate = _gained(gate, n, inside, INNER, entry, arena, offsets, UNIT)
        rank = tl.load(ranks + (entry + 1) * _ENTRY + _RANK)
        if rank > 0:
            up += _delta(
                shrunk + RANK_MAX, live, n, inside, entry + 1, rank,
                arena, offsets, scales, UNIT, PLANES, PLANE_ROWS * ROW,
                BLOCK_ROWS, BLOCK_OUTPUTS, DEPTH, PRECISION,
            )  # fmt: skip
            up = _gained(up, n, inside, INNER, entry + 1, arena, offsets, UNIT)
        gate = gate.to(y.dtype.element_ty).to(tl.float32)
        up = up.to(y.dtype.element_ty).to(tl.float32)
        gated = (activated(gate, GELU) * up).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * INNER + n[None, :], gated, mask=mask)


@triton.jit
def _gained(
    values: tl.tensor,
    n: tl.tensor,
    inside: tl.tensor,
    outputs: tl.tensor,
    entry: tl.tensor,
    arena: tl.tensor,
    offsets: tl.tensor,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """values [BLOCK_ROWS, BLOCK_OUTPUTS] · the gains of outputs `n`, if the adapter has some."""
    gain = tl.load(offsets + entry * (_ENTRY // 2) + 2)
    if gain > 0:
        at = arena + gain * UNIT + n
        factor = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        factor += tl.load(at + outputs, mask=inside, other=0.0).to(tl.float32)
        values = values * factor[None, :]
    return values


@triton.jit
def _delta(
    shrunk: tl.tensor,
    live: tl.tensor,
    n: tl.tensor,
    inside: tl.tensor,
    entry: tl.tensor,
    rank: tl.tensor,
    arena: tl.tensor,
    offsets: tl.tensor,
    scales: tl.tensor,
    UNIT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """scale · (sum of planes) · B, [BLOCK_ROWS, BLOCK_OUTPUTS] in fp32. shrunk: where each row lies
    in the first plane. n: outputs of B, those `inside` are read. entry: of the directory.
    """
    b = arena + tl.load(offsets + entry * (_ENTRY // 2) + 1) * UNIT
    scale = tl.load(scales + entry * _ENTRY + _SCALE)
    # The same twice; in the first the compiler sees that B's rows begin at multiples, and reads
    # several ranks at once.
    if rank % _RANK_UNIT == 0:
        even = rank // _RANK_UNIT * _RANK_UNIT
        delta = _product(
            shrunk, live, b, n, inside, even, PLANES, PLANE,
            BLOCK_ROWS, BLOCK_OUTPUTS, DEPTH, PRECISION,
        )  # fmt: skip
    else:
        delta = _product(
            shrunk, live, b, n, inside, rank, PLANES, PLANE,
            BLOCK_ROWS, BLOCK_OUTPUTS, DEPTH, PRECISION,
        )  # fmt: skip
    return delta * scale


@triton.jit
def _product(
    shrunk: tl.tensor,
    live: tl.tensor,
    b: tl.tensor,
    n: tl.tensor,
    inside: tl.tensor,
    rank: tl.tensor,
    PLANES: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """As `_delta`, of a B that begins at `b` and without the scale."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for at in range(0, rank, DEPTH):
        r = at + tl.arange(0, DEPTH)
        used = r < rank
        b_at = b + n[None, :] * rank + r[:, None]
        b_tile = tl.load(b_at, mask=used[:, None] & inside[None, :], other=0.0)
        s_at = shrunk[:, None] + r[None, :]
        mask = live[:, None] & used[None, :]
        s_tile = tl.load(s_at, mask=mask, other=0.0)
        for plane in tl.static_range(1, PLANES):
            s_tile += tl.load(s_at + plane * PLANE, mask=mask, other=0.0)
        total = tl.dot(s_tile.to(b_tile.dtype), b_tile, total, input_precision=PRECISION)
    return total
