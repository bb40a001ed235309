"""Steps of a whole model through the runner: decode over its bandwidth floor, what LoRA adds, and
prefill over its matmuls alone.

Rows hold random tokens' keys and values of `context` tokens, and decode the same position again and
again, each step taking its tokens from the one before on the device. A step's time is the loop's:
from launch to launch, as an engine sees it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from replica.launch import Row
from replica.request import Sampling
from replica.runner import Runner
from tests.bench.on_gpu.figures import median, medians, over, spread
from tests.bench.on_gpu.floors import decode_bytes, group_sizes, lora_share
from tests.bench.on_gpu.models import layout
from tests.bench.on_gpu.profiles import kernel_seconds, profiled
from tests.bench.on_gpu.served import release
from tests.bench.on_gpu.setting import Setting

SECTION = "decode"
GOAL_ROWS, GOAL_OVER_FLOOR = 64, 1.35
GOAL_LORA = "r16 × 8"
GOAL_DECODE_PERCENT, GOAL_PREFILL_PERCENT = 5.0, 8.0
_KERNELS = 20
_GREEDY = Sampling(max_tokens=2**20, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Sizes:
    """adapters: what they are called → the ranks of those that the rows share out evenly.

    prefills: tokens. parts: into how many sequences, each with its own adapter, one is cut.
    """

    rows: tuple[int, ...]
    lora_rows: int
    context: int
    adapters: dict[str, tuple[int, ...]]
    prefills: tuple[int, ...]
    parts: int
    rounds: int
    steps: int


FULL = Sizes(
    rows=(1, 8, 64, 256),
    lora_rows=64,
    context=1024,
    adapters={
        "r16 × 1": (16,),
        "r16 × 8": (16,) * 8,
        "r16 × 32": (16,) * 32,
        "r64 × 8": (64,) * 8,
    },
    prefills=(2048, 8192),
    parts=4,
    rounds=5,
    steps=40,
)
TINY = Sizes(
    rows=(1, 2),
    lora_rows=2,
    context=20,
    adapters={"r16 × 1": (16,), "r16 × 8": (4, 4)},
    prefills=(16,),
    parts=2,
    rounds=1,
    steps=1,
)


def run(setting: Setting) -> None:
    sizes = TINY if setting.tiny else FULL
    runner = _runner(setting, sizes)
    slots = _place_adapters(runner, setting, sizes)
    _decode(runner, setting, sizes)
    if setting.has_time(SECTION, "LoRA in decode"):
        _lora(runner, setting, sizes, slots)
    for tokens in sizes.prefills:
        if setting.has_time(SECTION, f"prefill of {tokens}"):
            _prefill(runner, setting, sizes, slots, tokens)
    if setting.device.type == "cuda" and setting.has_time(SECTION, "profile"):
        _profile(runner, setting, sizes, slots[GOAL_LORA])


def _runner(setting: Setting, sizes: Sizes) -> Runner:
    start_s = time.monotonic()
    release(setting.device)
    longest = max(*sizes.prefills, sizes.context)
    ranks = [rank for ranks in sizes.adapters.values() for rank in ranks]
    _, elements = layout(setting.shape, 1)
    page_bytes = 16 * 2 * setting.shape.layers * setting.shape.kv_heads * setting.shape.head_dim
    page_bytes *= setting.itemsize
    sequences = max(max(sizes.rows) * -(-sizes.context // 16), -(-longest // 16))
    config = setting.config(
        adapter_memory=sum(ranks) * elements * setting.itemsize + len(ranks) * 256,
        kv_memory=page_bytes * (sequences + 64),
        host_memory=0,
        directory_slots=len(ranks) + 1,
        batch_rows_max=max(sizes.rows),
        step_tokens_max=longest,
        context_tokens_max=longest + 64,
        prefix_cache=False,
    )
    runner = Runner(config, setting.shape)
    setting.report.tell(f"model and graphs made in {time.monotonic() - start_s:.1f} s")
    return runner


def _place_adapters(runner: Runner, setting: Setting, sizes: Sizes) -> dict[str, list[int]]:
    """Slots of each set of adapters. Their images are random numbers, made where they lie."""
    slots: dict[str, list[int]] = {}
    arena, offset, slot = runner.arena, 0, 1
    arena.memory.normal_(0, 0.02)
    for name, ranks in sizes.adapters.items():
        slots[name] = []
        for rank in ranks:
            made, elements = layout(setting.shape, rank)
            arena.place(slot, offset, made)
            slots[name].append(slot)
            offset += -(-elements * setting.itemsize // arena.alignment) * arena.alignment
            slot += 1
    return slots


def _rows(setting: Setting, sizes: Sizes, count: int, slots: Sequence[int] = (0,)) -> list[Row]:
    """Rows that decode at the end of their context; their adapters in turn."""
    pages = -(-sizes.context // 16)
    return [
        Row(
            tokens=[3 + i % (setting.shape.vocab - 3)],
            position=sizes.context - 1,
            pages=range(i * pages, (i + 1) * pages),
            slot=slots[i % len(slots)],
            sampling=_GREEDY,
            seed=i,
            generated=0,
        )
        for i in range(count)
    ]


def _fill(runner: Runner, setting: Setting, sizes: Sizes) -> None:
    """Keys and values of every row's context, by computing it."""
    generator = torch.Generator().manual_seed(setting.seed)
    pages = -(-sizes.context // 16)
    batch: list[Row] = []
    for i in range(max(sizes.rows)):
        drawn = torch.randint(3, setting.shape.vocab, (sizes.context,), generator=generator)
        row_pages = range(i * pages, (i + 1) * pages)
        batch.append(Row(drawn.tolist(), 0, row_pages, 0, _GREEDY, i, 0))
        if (len(batch) + 1) * sizes.context > max(*sizes.prefills, sizes.context):
            runner.run(batch)
            batch = []
    if batch:
        runner.run(batch)


def _decode(runner: Runner, setting: Setting, sizes: Sizes) -> None:
    _fill(runner, setting, sizes)
    rates = setting.rates
    for count in sizes.rows:
        rows = _rows(setting, sizes, count)
        rounds = [_step_s(runner, rows, sizes.steps) for _ in range(sizes.rounds + 1)][1:]
        step_s = median(rounds)
        contexts = [sizes.context] * count
        floor_s = decode_bytes(setting.shape, setting.itemsize, contexts) / rates.bytes_per_s
        setting.report.add(
            SECTION,
            f"step of {count} × {sizes.context}, over the bandwidth floor",
            step_s / floor_s,
            " ×",
            most=GOAL_OVER_FLOOR if count == GOAL_ROWS else None,
            beside=f"{step_s * 1e3:.2f} ms, floor {floor_s * 1e3:.2f} ms",
            spread=spread(rounds),
            rounds_s=rounds,
            launch_s=_launch_s(runner, rows),
        )


def _step_s(runner: Runner, rows: Sequence[Row], steps: int) -> float:
    """From launch to launch, with one step always ahead of the one whose tokens are read."""
    carried = [_carried(row, i) for i, row in enumerate(rows)]
    runner.run(rows)
    ticket = runner.launch(rows)
    ahead = runner.launch(carried)
    ticket.results()
    start_s = time.perf_counter()
    for _ in range(steps):
        ticket, ahead = ahead, runner.launch(carried)
        ticket.results()
    took_s = time.perf_counter() - start_s
    ahead.results()
    return took_s / steps


def _carried(row: Row, index: int) -> Row:
    return Row([0], row.position, row.pages, row.slot, row.sampling, row.seed, 1, carry=index)


def _launch_s(runner: Runner, rows: Sequence[Row]) -> float:
    """What the host takes to put a step on the device's queue."""
    found = []
    for _ in range(10):
        start_s = time.perf_counter()
        ticket = runner.launch(rows)
        found.append(time.perf_counter() - start_s)
        ticket.results()
    return median(found)


def _lora(runner: Runner, setting: Setting, sizes: Sizes, slots: dict[str, list[int]]) -> None:
    """Base and each set of adapters take turns, so that whatever drifts, drifts for all."""
    count = sizes.lora_rows
    batches = {"base": _rows(setting, sizes, count)}
    batches |= {name: _rows(setting, sizes, count, own) for name, own in slots.items()}
    rounds = [
        {name: _step_s(runner, rows, sizes.steps) for name, rows in batches.items()}
        for _ in range(sizes.rounds + 1)
    ][1:]
    found = medians(rounds)
    contexts = [sizes.context] * count
    for name, ranks in sizes.adapters.items():
        active = ranks[: min(count, len(ranks))]
        floor = lora_share(setting.shape, setting.itemsize, contexts, active)
        setting.report.add(
            SECTION,
            f"LoRA in decode, {name} at {count} rows, over base",
            100 * over(rounds, name, "base"),
            "%",
            most=GOAL_DECODE_PERCENT if name == GOAL_LORA else None,
            beside=f"floor {100 * floor:.1f}%, {found[name] * 1e3:.2f} ms, "
            f"base {found['base'] * 1e3:.2f} ms",
            rounds_s=rounds,
        )


def _profile(runner: Runner, setting: Setting, sizes: Sizes, slots: Sequence[int]) -> None:
    """Which kernels the time of a few steps goes to, which the profiler slows down."""
    steps = 5
    for name, own in (("base", [0]), (GOAL_LORA, slots)):
        rows = _rows(setting, sizes, sizes.lora_rows, own)
        path = (
            setting.report.out or setting.directory
        ) / f"step-{name.replace(' × ', 'x')}.json.gz"
        trace = profiled(lambda rows=rows: [runner.run(rows) for _ in range(steps)], path)
        for kernel, seconds, count in kernel_seconds(trace)[:_KERNELS]:
            setting.report.add(
                SECTION,
                f"{name}: {kernel[:70]}",
                seconds / steps * 1e6,
                " µs a step",
                beside=f"{count / steps:g} launches",
                short=False,
            )


def _prefill(
    runner: Runner, setting: Setting, sizes: Sizes, slots: dict[str, list[int]], tokens: int
) -> None:
    """One sequence, and `parts` sequences of as many tokens together; base and adapters in turn."""
    own = slots[GOAL_LORA]
    whole, part = [tokens], [tokens // sizes.parts] * sizes.parts
    batches = {
        "base": _chunks(setting, whole, [0]),
        "one adapter": _chunks(setting, whole, own),
        "base, in parts": _chunks(setting, part, [0]),
        "an adapter a part": _chunks(setting, part, own),
    }
    rounds = [
        {name: _run_s(runner, rows) for name, rows in batches.items()}
        for _ in range(sizes.rounds + 2)
    ][2:]
    found = medians(rounds)
    matmuls_s = _matmuls_s(setting, tokens)
    setting.report.add(
        SECTION,
        f"prefill of {tokens:,}, matmuls alone ÷ all",
        100 * matmuls_s / found["base"],
        "%",
        beside=f"{found['base'] * 1e3:.1f} ms, matmuls {matmuls_s * 1e3:.1f} ms",
        rounds_s=rounds,
    )
    for name, base in (("one adapter", "base"), ("an adapter a part", "base, in parts")):
        setting.report.add(
            SECTION,
            f"LoRA in prefill of {tokens:,}, {name}, over base",
            100 * over(rounds, name, base),
            "%",
            most=GOAL_PREFILL_PERCENT,
            beside=f"{found[name] * 1e3:.1f} ms, base {found[base] * 1e3:.1f} ms",
        )


def _chunks(setting: Setting, lengths: Sequence[int], slots: Sequence[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(setting.seed)
    rows, page = [], 0
    for i, length in enumerate(lengths):
        drawn = torch.randint(3, setting.shape.vocab, (length,), generator=generator).tolist()
        held = -(-length // 16)
        pages = range(page, page + held)
        rows.append(Row(drawn, 0, pages, slots[i % len(slots)], _GREEDY, i, 0))
        page += held
    return rows


def _run_s(runner: Runner, rows: Sequence[Row]) -> float:
    start_s = time.perf_counter()
    runner.run(rows)
    return time.perf_counter() - start_s


def _matmuls_s(setting: Setting, tokens: int) -> float:
    """All layers' matmuls, one after the other: one layer's weights are larger than any cache."""
    shape = setting.shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=setting.dtype, device=setting.device)

    pairs = [(draw(tokens, wide), draw(out, wide)) for wide, out in group_sizes(shape)]
    last, head = draw(1, shape.hidden), draw(shape.vocab, shape.hidden)

    def layers() -> None:
        for _ in range(shape.layers):
            for x, weight in pairs:
                F.linear(x, weight)
        F.linear(last, head)

    run: Callable[[], None] = torch.inference_mode()(layers)
    return median(setting.timer.seconds(run, capture=False))
