"""Steps of a whole model: decode over its bandwidth floor, what LoRA adds to decode, to prefill and
to both at once; steps of the runner alone, and then of the engine with its scheduler around it.

Rows hold random tokens' keys and values of `context` tokens, and decode the same position again and
again, each step taking its tokens from the one before on the device. A step's time is the loop's,
from launch to launch; a prefill's and a mixed step's is until its tokens are there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch.nn import functional as F

from lora_kernels import lora
from lora_kernels.launching import Launcher
from replica.engine.runner import Runner
from replica.model import graphs
from replica.model.launch import Row
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.on_gpu.figures import median, medians, over, spread
from tests.bench.on_gpu.floors import (
    decode_bytes,
    group_sizes,
    image_bytes,
    kv_token_bytes,
    lora_share,
)
from tests.bench.on_gpu.models import Adapters, layout, scratch
from tests.bench.on_gpu.profiles import kernel_seconds, profiled
from tests.bench.on_gpu.served import Served, served
from tests.bench.on_gpu.setting import Setting

SECTION = "decode"
GOAL_ROWS, GOAL_OVER_FLOOR = 64, 1.35
GOAL_LORA = "r16 × 8"
GOAL_DECODE_PERCENT, GOAL_PREFILL_PERCENT = 5.0, 8.0
_KERNELS = 20
_GREEDY = Sampling(max_tokens=2**20, temperature=0.0, ignore_eos=True)
_TOP_P = replace(_GREEDY, temperature=0.8, top_p=0.9)
_Measured = TypeVar("_Measured")
_Seconds = Callable[[Sequence[Row]], float]
_Way = Callable[[_Seconds, Sequence[Row]], float]


@dataclass(frozen=True, slots=True)
class Sizes:
    """adapters: what they are called → the ranks of those that the rows share out evenly.

    prefills: how many sequences, each with its own adapter, of how many tokens. chunk: of the
    prompt in a mixed step.
    """

    rows: tuple[int, ...]
    lora_rows: int
    context: int
    adapters: dict[str, tuple[int, ...]]
    prefills: tuple[tuple[int, int], ...]
    chunk: int
    rounds: int
    steps: int

    @property
    def tokens(self) -> int:
        """Of the largest step."""
        return max(self.context, *(count * length for count, length in self.prefills))


FULL = Sizes(
    rows=(1, 8, 64, 256),
    lora_rows=64,
    context=1024,
    adapters={
        GOAL_LORA: (16,) * 8,
        "r16 × 1": (16,),
        "r16 × 32": (16,) * 32,
        "r64 × 8": (64,) * 8,
    },
    prefills=((1, 2048), (4, 512), (1, 8192), (4, 2048), (8, 128), (1, 128)),
    chunk=512,
    rounds=5,
    steps=40,
)
TINY = Sizes(
    rows=(1, 2),
    lora_rows=2,
    context=20,
    adapters={GOAL_LORA: (4, 4), "r16 × 1": (16,)},
    prefills=((1, 16), (2, 4)),
    chunk=8,
    rounds=1,
    steps=1,
)


def run(setting: Setting) -> None:
    sizes = _fitting(setting, TINY if setting.tiny else FULL)
    with _engine(setting, sizes) as server:
        runner = server.engine.runner
        captured = graphs.Captured(runner.capture_fallback)
        what, why = "captures that failed", captured.name.lower()
        setting.report.add(SECTION, what, captured, most=0, beside=why)
        slots = place_adapters(runner, setting, sizes)
        own = slots[GOAL_LORA]
        setting.attempt(SECTION, "contexts", partial(_fill, runner, setting, sizes))
        # What is worth most first: whatever fails or is late leaves those before it.
        for what, work in _compared(runner, setting, sizes, slots).items():
            setting.attempt(SECTION, what, partial(work, what))
        for count in sizes.rows:
            what = f"{count} rows"
            setting.attempt(SECTION, what, partial(_decode, runner, setting, sizes, count))
        if setting.device.type == "cuda":
            for name, of in (("base", [0]), (GOAL_LORA, own)):
                profile = partial(_profile, runner, setting, sizes, name, of)
                setting.attempt(SECTION, f"profile of {name}", profile)
        for placed in slots.values():
            for slot in placed:
                runner.arena.clear(slot)
        adapters = [name for name in server.digests if name is not None]
        for what, names in (("base", [None]), (GOAL_LORA, adapters)):
            steps = partial(_engine_steps, server, setting, sizes, what, names)
            setting.attempt(SECTION, f"the engine's steps, {what}", steps)


def _compared(
    runner: Runner, setting: Setting, sizes: Sizes, slots: Mapping[str, Sequence[int]]
) -> dict[str, Callable[[str], None]]:
    """What LoRA adds, in percent, and top-p: by name, what measures it."""
    made: dict[str, Callable[[str], None]] = {}
    shape, itemsize, count = setting.shape, setting.itemsize, sizes.lora_rows
    step = partial(_step_s, runner, steps=sizes.steps)
    once, host = partial(_run_s, runner), partial(_launch_s, runner)
    over = partial(_over, setting, sizes.rounds)
    base, own = decoding(setting, sizes, count), slots[GOAL_LORA]
    for name, placed in slots.items():
        active = sizes.adapters[name][: min(count, len(placed))]
        floor = lora_share(shape, itemsize, [sizes.context] * count, active)
        made[f"LoRA in decode, {name} at {count} rows"] = partial(
            over,
            measure=step,
            base=base,
            more=decoding(setting, sizes, count, placed),
            most=GOAL_DECODE_PERCENT if name == GOAL_LORA else None,
            beside=f", floor {100 * floor:.1f}%",
        )
    # Rows that decode and a piece of a prompt, as while requests come.
    rows, page = min(count, max(sizes.rows) - 1), max(sizes.rows) * -(-sizes.context // 16)
    mixed = [
        [
            *decoding(setting, sizes, rows, placed),
            *prompts_of(setting, 1, sizes.chunk, placed, page),
        ]
        for placed in ([0], own)
    ]
    both = f"a step of {rows} decodes and {sizes.chunk} prompt tokens"
    made[f"LoRA in {both}"] = partial(over, measure=once, launch=host, base=mixed[0], more=mixed[1])
    for prompts, length in sizes.prefills:
        tokens = prompts * length
        made[f"LoRA in prefill of {prompts} × {length:,}"] = partial(
            over,
            measure=once,
            launch=host if tokens <= 2048 else None,
            base=prompts_of(setting, prompts, length, [0]),
            more=prompts_of(setting, prompts, length, own),
            most=GOAL_PREFILL_PERCENT if tokens >= 2048 else None,
            matmuls=tokens,
        )

    def in_two_ways(batch: Sequence[Row], base: _Way, more: _Way) -> Callable[[str], None]:
        measure, launch = (lambda way, of=of: way(of, batch) for of in (once, host))
        return partial(over, measure=measure, launch=launch, base=base, more=more)

    prompts, length = sizes.prefills[-1]
    prefill = prompts_of(setting, prompts, length, own)
    for what, batch in ((both, mixed[1]), (f"prefill of {prompts} × {length:,}", prefill)):
        made[f"launches as Triton makes them, LoRA in {what}"] = in_two_ways(
            batch, _directly, _by_triton
        )
        tokens, bound = sum(len(row.tokens) for row in batch), lora.HOST_BOUND_ROWS
        other = 0 if tokens <= bound else tokens
        made[f"up to {other} rows bound by the host, LoRA in {what}"] = in_two_ways(
            batch, partial(_bounded, runner, bound), partial(_bounded, runner, other)
        )
    # The draw is behind the graph.
    made[f"top-p 0.9 instead of greedy in decode, {GOAL_LORA} at {count} rows"] = partial(
        over,
        measure=step,
        base=decoding(setting, sizes, count, own),
        more=decoding(setting, sizes, count, own, _TOP_P),
    )
    return made


def _over(
    setting: Setting,
    rounds: int,
    what: str,
    *,
    measure: Callable[[_Measured], float],
    launch: Callable[[_Measured], float] | None = None,
    base: _Measured,
    more: _Measured,
    most: float | None = None,
    beside: str = "",
    matmuls: int = 0,
) -> None:
    """They take turns, so that whatever drifts, drifts for both; the first two only warm up.

    launch: how long the host takes of it. matmuls: tokens whose matmuls alone are told beside.
    """
    warm = 0 if setting.tiny else 2
    turns = [{"base": measure(base), "more": measure(more)} for _ in range(warm + rounds)][warm:]
    found = medians(turns)
    if launch is not None:
        beside += f", launched in {launch(more) * 1e3:.2f} ms, without {launch(base) * 1e3:.2f}"
    if matmuls:
        beside += f", matmuls alone {_matmuls_s(setting, matmuls) * 1e3:.2f} ms"
    setting.report.add(
        SECTION,
        what,
        100 * over(turns, "more", "base"),
        "%",
        most=most,
        beside=f"{found['more'] * 1e3:.2f} ms, without {found['base'] * 1e3:.2f}{beside}",
        rounds_s=turns,
    )


def _fitting(setting: Setting, sizes: Sizes) -> Sizes:
    """Without the batches whose keys and values this card has no memory for."""
    row_bytes = kv_token_bytes(setting.shape, setting.itemsize) * sizes.context
    room = setting.room - _adapter_bytes(setting, sizes)
    rows = tuple(count for count in sizes.rows if count * row_bytes < 0.8 * room)
    return replace(sizes, rows=rows, lora_rows=min(sizes.lora_rows, max(rows)))


def _adapter_bytes(setting: Setting, sizes: Sizes) -> int:
    ranks = [rank for ranks in sizes.adapters.values() for rank in ranks]
    return sum(image_bytes(setting.shape, rank, setting.itemsize) + 256 for rank in ranks)


@contextlib.contextmanager
def _engine(setting: Setting, sizes: Sizes) -> Iterator[Served]:
    """One model for both: its runner first, then the engine, which has the adapters that the goal
    is for.
    """
    start_s = time.monotonic()
    sequences = max(max(sizes.rows) * -(-sizes.context // 16), -(-sizes.tokens // 16))
    page_bytes = 16 * kv_token_bytes(setting.shape, setting.itemsize)
    adapter_bytes = _adapter_bytes(setting, sizes)
    ranks = sizes.adapters[GOAL_LORA]
    images = sum(image_bytes(setting.shape, rank, setting.itemsize) for rank in ranks)
    with scratch(2**30) as directory, only(sizes.rows):
        adapters = Adapters(directory, setting.shape, setting.dtype, setting.device)
        versions = adapters.versions({f"a{i}": rank for i, rank in enumerate(ranks)})
        config = setting.config(
            adapter_memory=adapter_bytes,
            kv_memory=page_bytes * (sequences + 64),
            host_memory=2 * images,
            directory_slots=sum(map(len, sizes.adapters.values())) + 1,
            batch_rows_max=max(sizes.rows),
            step_tokens_max=sizes.tokens,
            context_tokens_max=sizes.tokens + 64,
            prefix_cache=False,
        )
        with served(config, versions, setting.device) as server:
            setting.report.tell(f"model and graphs made in {time.monotonic() - start_s:.1f} s")
            yield server


@contextlib.contextmanager
def only(rows: Sequence[int]) -> Iterator[None]:
    """Graphs of the batches that are measured, for each takes its time to capture."""
    before = graphs.buckets
    graphs.buckets = lambda rows_max: list(rows)
    try:
        yield
    finally:
        graphs.buckets = before


def place_adapters(runner: Runner, setting: Setting, sizes: Sizes) -> dict[str, list[int]]:
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


def decoding(
    setting: Setting,
    sizes: Sizes,
    count: int,
    slots: Sequence[int] = (0,),
    sampling: Sampling = _GREEDY,
) -> list[Row]:
    """Rows that decode at the end of their context; their adapters in turn."""
    pages = -(-sizes.context // 16)
    return [
        Row(
            tokens=[3 + i % (setting.shape.vocab - 3)],
            position=sizes.context - 1,
            pages=range(i * pages, (i + 1) * pages),
            slot=slots[i % len(slots)],
            sampling=sampling,
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
        if (len(batch) + 1) * sizes.context > sizes.tokens:
            runner.run(batch)
            batch = []
    if batch:
        runner.run(batch)


def _decode(runner: Runner, setting: Setting, sizes: Sizes, count: int) -> None:
    rows = decoding(setting, sizes, count)
    rounds = [_step_s(runner, rows, sizes.steps) for _ in range(sizes.rounds + 1)][1:]
    step_s = median(rounds)
    size = decode_bytes(setting.shape, setting.itemsize, [sizes.context] * count)
    floor_s, read_s = size / setting.rates.bytes_per_s, size / setting.rates.read_bytes_per_s
    setting.report.add(
        SECTION,
        f"step of {count} × {sizes.context}, over the bandwidth floor",
        step_s / floor_s,
        " ×",
        most=GOAL_OVER_FLOOR if count == GOAL_ROWS else None,
        beside=f"{step_s * 1e3:.2f} ms, floor {floor_s * 1e3:.2f}, only read {read_s * 1e3:.2f} ms",
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


def _profile(
    runner: Runner, setting: Setting, sizes: Sizes, name: str, slots: Sequence[int]
) -> None:
    """Which kernels the time of a few steps goes to, which the profiler slows down."""
    steps = 5
    rows = decoding(setting, sizes, sizes.lora_rows, slots)
    path = (setting.report.out or setting.directory) / f"step-{name.replace(' × ', 'x')}.json.gz"
    trace = profiled(lambda: [runner.run(rows) for _ in range(steps)], path)
    for kernel, seconds, count in kernel_seconds(trace)[:_KERNELS]:
        setting.report.add(
            SECTION,
            f"{name}: {kernel[:70]}",
            seconds / steps * 1e6,
            " µs a step",
            beside=f"{count / steps:g} launches",
            short=False,
        )


def _engine_steps(
    server: Served, setting: Setting, sizes: Sizes, what: str, names: Sequence[str | None]
) -> None:
    """The same decode steps planned by the scheduler and committed to it, as a server's are."""
    engine, count, steps = server.engine, sizes.lora_rows, sizes.steps
    generator = torch.Generator().manual_seed(setting.seed)
    # While an adapter is on its way, rows of the others would decode all that they may.
    for name in dict.fromkeys(names[:count]):
        once = replace(_GREEDY, max_tokens=1)
        engine.add(NewRequest(f"{what} loads {name}", (3,), once, server.digests[name]))
    server.settle()
    # Those that have their prompts computed first decode meanwhile.
    longest = sizes.context - 2 * count - steps * (sizes.rounds + 2)
    prompt = max(longest, sizes.context // 4)
    waiting = {f"{what} {i}": names[i % len(names)] for i in range(count)}
    for request, name in waiting.items():
        drawn = torch.randint(3, setting.shape.vocab, (prompt,), generator=generator).tolist()
        sampling = replace(_GREEDY, max_tokens=sizes.context - prompt)
        engine.add(NewRequest(request, tuple(drawn), sampling, server.digests[name]))
    everyone = list(waiting)
    while waiting:
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            waiting.pop(delta.request_id, None)
    rounds = []
    for _ in range(sizes.rounds):
        start_s = time.perf_counter()
        for _ in range(steps):
            engine.step()
        rounds.append((time.perf_counter() - start_s) / steps)
    running = list(engine.scheduler.running_set.running.values())
    assert len(running) == count, f"{len(running)} of {count} rows were left"
    context = sum(request.computed for request in running) // count
    for name in everyone:
        engine.cancel(name)
    server.settle()
    placed = [0] if what == "base" else sorted(engine.runner.arena._placed)
    alike = decoding(setting, replace(sizes, context=context), count, placed)
    alone = [_step_s(engine.runner, alike, steps) for _ in range(sizes.rounds + 1)][1:]
    setting.report.add(
        SECTION,
        f"the engine's step, {what}, {count} × {context:,}, over the runner's",
        100 * (median(rounds) / median(alone) - 1),
        "%",
        beside=f"{median(rounds) * 1e3:.2f} ms, runner alone {median(alone) * 1e3:.2f} ms",
        spread=spread(rounds),
        rounds_s=rounds,
    )


def prompts_of(
    setting: Setting, count: int, length: int, slots: Sequence[int], page: int = 0
) -> list[Row]:
    """page: the first that they may use."""
    generator = torch.Generator().manual_seed(setting.seed)
    rows, held = [], -(-length // 16)
    for i in range(count):
        drawn = torch.randint(3, setting.shape.vocab, (length,), generator=generator).tolist()
        pages = range(page + i * held, page + (i + 1) * held)
        rows.append(Row(drawn, 0, pages, slots[i % len(slots)], _GREEDY, i, 0))
    return rows


def _directly(measure: _Seconds, batch: Sequence[Row]) -> float:
    return measure(batch)


def _by_triton(measure: _Seconds, batch: Sequence[Row]) -> float:
    """Every launch as Triton makes it."""
    launch = Launcher.__getitem__
    Launcher.__getitem__ = lambda kernel, grid: partial(kernel._as_triton, grid)
    try:
        return measure(batch)
    finally:
        Launcher.__getitem__ = launch


def _bounded(runner: Runner, bound: int, measure: _Seconds, batch: Sequence[Row]) -> float:
    """With another bound on the steps in which LoRA spares the host."""
    kept, lora.HOST_BOUND_ROWS = lora.HOST_BOUND_ROWS, bound
    runner._executor._lora._begun = None
    try:
        return measure(batch)
    finally:
        lora.HOST_BOUND_ROWS = kept
        runner._executor._lora._begun = None


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
