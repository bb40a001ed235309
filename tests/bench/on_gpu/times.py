"""Each kernel's time over its own floor: the bytes it must move, or its operations, at the rates
measured on this device.

A small kernel takes less than the graph that it is launched from, so 20 of them go into one, as in
a step: attention and LoRA over a layer after the other, so that keys and adapters come from memory;
what lies between matmuls over the same activations, which lie in the cache in a step too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lora_kernels import attention, fused
from replica.model.shape import GROUPS, ModelShape
from tests.bench.on_gpu import small_copies
from tests.bench.on_gpu.check_lora import drawn
from tests.bench.on_gpu.figures import median, spread
from tests.bench.on_gpu.floors import Cost, attention_cost, lora_cost
from tests.bench.on_gpu.inputs import LAYERS, PAGE_TOKENS, Draw, Heads
from tests.bench.on_gpu.setting import Setting

SECTION = "time"
_PIECES = 20
# Where one piece takes longer by its floor, the graph around it does not show.
_SMALL_S = 100e-6


@dataclass(frozen=True, slots=True)
class Timed:
    """run: with the layer, from 0 to `layers` − 1."""

    name: str
    run: Callable[[int], object]
    cost: Cost
    layers: int = 1
    short: bool = True


@torch.inference_mode()
def run(setting: Setting) -> None:
    draw = Draw(setting.seed, setting.device, setting.dtype)
    shape, tiny = setting.shape, setting.tiny
    _ = setting.rates
    for name, kernels in (
        ("attention", _attention(draw, shape, tiny)),
        ("LoRA", _lora(draw, shape, tiny)),
        ("fused kernels", _fused(draw, shape, tiny)),
    ):
        setting.attempt(SECTION, name, partial(_measure_all, setting, kernels))
    setting.attempt(SECTION, "small copies", partial(small_copies.run, setting))


def _measure_all(setting: Setting, kernels: Iterator[Timed]) -> None:
    for timed in kernels:
        setting.attempt(SECTION, timed.name, partial(_measure, setting, timed))


def _measure(setting: Setting, timed: Timed) -> None:
    rates = setting.rates
    floor_s = timed.cost.floor_s(rates)
    pieces = _PIECES if floor_s < _SMALL_S and not setting.tiny else 1

    def work() -> None:
        for piece in range(pieces):
            timed.run(piece % timed.layers)

    found = setting.timer.seconds(work, pieces=pieces)
    took_s = median(found)
    beside = f"{took_s * 1e6:,.1f} µs, floor {floor_s * 1e6:,.1f} ({timed.cost.bound_by(rates)})"
    setting.report.add(
        SECTION,
        timed.name,
        took_s / floor_s,
        " ×",
        beside=beside + (f", {pieces} a graph" if pieces > 1 else ""),
        short=timed.short,
        seconds=took_s,
        spread=spread(found),
        bytes=timed.cost.bytes,
        flop=timed.cost.flop,
    )


def _attention(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Timed]:
    steps = [(64, 1024), (1, 1024), (8, 1024), (256, 1024), (1, 32768)]
    for rows, length in [(2, 20)] if tiny else steps:
        yield _decode(draw, shape, rows, length, tiny)
    chunks = [(1, 2048, 2048), (1, 8192, 8192), (4, 512, 512), (1, 512, 8192)]
    for rows, queries, keys in [(1, 8, 8)] if tiny else chunks:
        yield _prefill(draw, shape, rows, queries, keys)


def _decode(draw: Draw, shape: ModelShape, rows: int, length: int, tiny: bool) -> Timed:
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim)
    layers = _PIECES if rows * length <= 2**13 and not tiny else 1
    p = draw.paged(heads, [(1, length)] * rows, layers)
    scratch = attention.decode_scratch(rows, shape.heads, shape.head_dim, draw.device)

    def run(layer: int) -> None:
        keys, values = p.cache[:, layer, 0], p.cache[:, layer, 1]
        attention.decode(p.q, keys, values, p.table, p.lengths, p.scale, None, None, p.out, scratch)

    cost = attention_cost(shape, draw.dtype.itemsize, p.rows)
    return Timed(f"attention, decode {rows} × {length:,}", run, cost, layers)


def _prefill(draw: Draw, shape: ModelShape, rows: int, queries: int, keys: int) -> Timed:
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim)
    p = draw.paged(heads, [(queries, keys)] * rows)

    def run(layer: int) -> None:
        attention.prefill(
            p.q,
            p.keys,
            p.values,
            p.table,
            p.starts,
            p.lengths,
            p.queries_max,
            p.scale,
            None,
            None,
            p.out,
        )

    cost = attention_cost(shape, draw.dtype.itemsize, p.rows)
    return Timed(f"attention, prefill {rows} × {queries:,} of {keys:,}", run, cost)


def _lora(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Timed]:
    """Shrink and expand, one after the other; not beside the base matmul, as in a step."""
    batches = {
        "64 rows, r16 × 1": ([16], 64),
        "64 rows, r16 × 8": ([16] * 8, 64),
        "64 rows, r16 × 32": ([16] * 32, 64),
        "64 rows, r64 × 8": ([64] * 8, 64),
        "2,048 rows, r16 × 4": ([16] * 4, 2048),
    }
    if tiny:
        batches = {"4 rows, r4 × 2": ([4] * 2, 4)}
    for name, (ranks, rows) in batches.items():
        yield from _layer(draw, shape, name, ranks, rows, 1 if tiny else _PIECES)


def _layer(
    draw: Draw, shape: ModelShape, name: str, ranks: list[int], rows: int, layers: int
) -> Iterator[Timed]:
    adapters = drawn(draw, shape, ranks, layers)
    operation = adapters.operation(rows)
    # Each adapter's rows follow each other, as in a prefill; a launch sorts them anyway.
    operation.begin([1 + i * len(ranks) // rows for i in range(rows)], rows)
    pairs = [adapters.batch(draw, rows, group) for group in range(len(GROUPS))]
    total = Cost(0.0)
    for group, ((x, y), projections) in enumerate(zip(pairs, GROUPS, strict=True)):
        sizes = [(inputs, outputs) for _, inputs, outputs in adapters.groups[group]]
        own = [(rank, rows // len(ranks)) for rank in ranks]
        cost = lora_cost(sizes, own, draw.dtype.itemsize)
        total += cost

        def run(layer: int, x: torch.Tensor = x, y: torch.Tensor = y, group: int = group) -> None:
            operation.add(x, y, layer, group)

        yield Timed(f"LoRA {name}, {' '.join(projections)}", run, cost, layers, short=False)

    def whole(layer: int) -> None:
        for group, (x, y) in enumerate(pairs):
            operation.add(x, y, layer, group)

    yield Timed(f"LoRA {name}, a layer's 8 launches", whole, total, layers)


def _fused(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Timed]:
    for rows in (4,) if tiny else (64, 2048):
        yield from _between_matmuls(draw, shape, rows)
    rows = 4 if tiny else 64
    logits, uniform = draw.normal(rows, shape.vocab), draw.uniform(rows)
    cost = Cost(logits.numel() * draw.dtype.itemsize)
    for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        heat = torch.full((rows,), temperature, device=draw.device)
        run = _same(fused.choose, logits, heat, uniform)
        yield Timed(f"choose {rows} × {shape.vocab:,}, {name}", run, cost)


def _same(run: Callable[..., object], *arguments: object) -> Callable[[int], object]:
    """The same in every layer."""
    return lambda layer: run(*arguments)


def _between_matmuls(draw: Draw, shape: ModelShape, rows: int) -> Iterator[Timed]:
    hidden, itemsize = shape.hidden, draw.dtype.itemsize
    x, residual, weight = draw.normal(rows, hidden), draw.normal(rows, hidden), draw.normal(hidden)
    run = _same(fused.rms_norm, x, weight, 1e-5)
    yield Timed(f"rms_norm {rows:,} × {hidden:,}", run, Cost(2 * x.numel() * itemsize), short=False)
    # Small, so that what is added again and again stays finite.
    run = _same(fused.add_rms_norm, x * 1e-3, residual, weight, 1e-5)
    yield Timed(f"add_rms_norm {rows:,} × {hidden:,}", run, Cost(4 * x.numel() * itemsize))
    gate_up = draw.normal(rows, 2 * shape.intermediate)
    cost = Cost(1.5 * gate_up.numel() * itemsize)
    yield Timed(f"silu_mul {rows:,} × {shape.intermediate:,}", _same(fused.silu_mul, gate_up), cost)
    yield _rotary(draw, rows, Heads(shape.heads, shape.kv_heads, shape.head_dim))


def _rotary(draw: Draw, rows: int, heads: Heads) -> Timed:
    """A turn keeps lengths, however often it is taken."""
    qkv = draw.normal(rows, heads.heads + 2 * heads.kv_heads, heads.head_dim)
    pages = -(-rows // PAGE_TOKENS) + 1
    cache = draw.normal(pages, LAYERS, 2, heads.kv_heads, PAGE_TOKENS, heads.head_dim)
    angles = torch.arange(4096, device=draw.device)[:, None] * draw.uniform(heads.head_dim // 2)
    cos = torch.cat([angles.cos(), angles.cos()], 1).to(draw.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], 1).to(draw.dtype)
    positions, targets = draw.indices(4096, rows).int(), draw.order(rows).int()
    run = _same(
        fused.rotary_store, qkv, positions, cos, sin, cache[:, 1, 0], cache[:, 1, 1], targets
    )
    # Queries are read and written, keys and values read and stored; a line of each table a token.
    cost = Cost((2 * qkv.numel() + 2 * rows * heads.head_dim) * draw.dtype.itemsize)
    return Timed(f"rotary_store {rows:,} tokens", run, cost)
