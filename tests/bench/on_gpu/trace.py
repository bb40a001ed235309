"""How long the device waits for work while large adapters are copied in under running batches.

Base rows decode all the while. Adapters of over 1 GB have half as many places as there are of them;
requests come for all those that are not there, and again, until sixteen were copied in. Marks on
the device's own queue before and after each batch give the gaps between batches. A batch that was
put on the queue when the one before had already ended counts the host's time for that as idle too,
for the mark before it cannot tell.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cluster.values import Tier
from replica.engine.engine import Engine
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.on_gpu.figures import (
    covered_share,
    gaps,
    idle_share,
    median,
)
from tests.bench.on_gpu.floors import image_bytes
from tests.bench.on_gpu.models import Adapters, scratch
from tests.bench.on_gpu.profiles import intervals, profiled
from tests.bench.on_gpu.served import Served, counted, served
from tests.bench.on_gpu.setting import Setting
from tests.bench.on_gpu.timing import Spans

SECTION = "trace"
GOAL_PERCENT = 2.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """rows: of the base model, each with `prompt` tokens before it decodes."""

    loads: int
    adapters: int
    rank: int
    places: int
    rows: int
    prompt: int
    calm_steps: int


FULL = Sizes(loads=16, adapters=16, rank=256, places=8, rows=32, prompt=1024, calm_steps=100)
TINY = Sizes(loads=2, adapters=2, rank=8, places=1, rows=1, prompt=8, calm_steps=2)


@dataclass(slots=True)
class Watch:
    """Stands before a runner's `launch`. late_s: see the module."""

    device: torch.device
    launch: Callable[..., Any]
    spans: Spans = field(init=False)
    late_s: float = 0.0
    _ended: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        self.spans = Spans(self.device)

    def start(self) -> None:
        self.late_s = 0.0
        self.spans.start()

    def __call__(self, rows: Sequence[Any]) -> Any:
        start_s = time.perf_counter()
        ticket = self.spans.around(lambda: self.launch(rows))
        if self.device.type == "cuda":
            if self._ended is not None and self._ended.query():
                self.late_s += time.perf_counter() - start_s
            self._ended = self.spans.last_end()
        return ticket

    def idle(self) -> tuple[float, list[float], float]:
        """The share of the time since `start` that the device waited, its gaps, and that time."""
        mark = self.spans.mark()
        busy = self.spans.read()
        whole_s = self.spans.since_start(mark)
        return idle_share(busy, 0.0, whole_s) + self.late_s / whole_s, gaps(busy), whole_s


def run(setting: Setting) -> None:
    sizes = TINY if setting.tiny else FULL
    size = image_bytes(setting.shape, sizes.rank, setting.itemsize)
    with scratch(2 * size) as directory:
        adapters = Adapters(directory, setting.shape, setting.dtype, setting.device)
        versions = adapters.versions({f"a{i}": sizes.rank for i in range(sizes.adapters)})
        config = setting.config(
            adapter_memory=sizes.places * (size + 256),
            kv_memory=2**21 if setting.tiny else 16 * 2**30,
            host_memory=sizes.adapters * (size + 2**20),
            slots_max=sizes.places,
            directory_slots=2 * sizes.adapters,
            loads_in_flight_max=4,
            batch_rows_max=8 if setting.tiny else 64,
            step_tokens_max=64 if setting.tiny else 2048,
            context_tokens_max=256 if setting.tiny else 4096,
            prefix_cache=False,
        )
        with served(config, versions, setting.device) as server:
            server.warm([sizes.prompt // 8, sizes.prompt], 2, setting.seed)
            rng = random.Random(setting.seed)
            watch = Watch(setting.device, server.engine.runner.launch)
            server.engine.runner.launch = watch  # type: ignore[method-assign]
            _begin_rows(server.engine, sizes, rng)
            loads = partial(_loads, setting, server.engine, watch, sizes, size, rng)
            setting.attempt(SECTION, "device idle during loads", loads)
            calm = partial(_calm, setting, server.engine, watch, sizes)
            setting.attempt(SECTION, "device idle without loads", calm)
            if setting.device.type == "cuda":
                profile = partial(_profile, setting, server, sizes, rng)
                setting.attempt(SECTION, "profile", profile)


def _begin_rows(engine: Engine, sizes: Sizes, rng: random.Random) -> None:
    for i in range(sizes.rows):
        _ask(engine, rng, f"base {i}", sizes.prompt, 3 * sizes.prompt - 2, None)
    _until_first(engine, {f"base {i}" for i in range(sizes.rows)})


def _loads(
    setting: Setting, engine: Engine, watch: Watch, sizes: Sizes, size: int, rng: random.Random
) -> None:
    before = engine.report()
    watch.start()
    while engine.report().loads - before.loads < sizes.loads:
        _ask_for_absent(engine, rng, sizes)
    idle, idle_gaps, took_s = watch.idle()
    counts = counted(before, engine.report())
    copied = counts["loads"] * size
    setting.report.add(
        SECTION,
        f"device idle during {counts['loads']} loads of {size / 1e9:.2f} GB",
        100 * idle,
        "%",
        most=GOAL_PERCENT,
        beside=f"{took_s:.2f} s, {copied / took_s / 1e9:.1f} GB/s copied, "
        f"longest gap {1e3 * max(idle_gaps, default=0.0):.2f} ms, "
        f"{engine.report().host_locked_bytes / 1e9:.1f} GB page-locked",
        counts=counts,
        gaps_s=idle_gaps,
        late_s=watch.late_s,
    )


def _calm(setting: Setting, engine: Engine, watch: Watch, sizes: Sizes) -> None:
    watch.start()
    for _ in range(sizes.calm_steps):
        engine.step()
    idle, idle_gaps, took_s = watch.idle()
    setting.report.add(
        SECTION,
        "device idle without loads",
        100 * idle,
        "%",
        beside=f"{took_s / sizes.calm_steps * 1e3:.2f} ms a step, "
        f"median gap {1e6 * median(idle_gaps or [0.0]):.0f} µs",
        gaps_s=idle_gaps,
    )


def _profile(setting: Setting, server: Served, sizes: Sizes, rng: random.Random) -> None:
    """The same again under torch's profiler, which slows it down: what ran under what."""
    path = (setting.report.out or setting.directory) / "trace.json.gz"
    trace = profiled(lambda: _ask_for_absent(server.engine, rng, sizes), path)
    copies = intervals(trace, "gpu_memcpy", bytes_min=2**20)
    kernels = intervals(trace, "kernel")
    idle = idle_share(kernels, min(b for b, _ in kernels), max(e for _, e in kernels))
    setting.report.add(
        SECTION,
        f"of {len(copies)} large copies' time, under running kernels",
        100 * covered_share(copies, kernels),
        "%",
        beside=f"profiled; no kernel ran {100 * idle:.1f}% of the time",
    )


def _ask_for_absent(engine: Engine, rng: random.Random, sizes: Sizes) -> None:
    """A request for each adapter that is not on the device, until all have their first token."""
    absent = [e.digest for e in engine.adapter_states() if e.tier is not Tier.DEVICE]
    names = {f"{engine.steps}: {digest}": digest for digest in absent}
    for name, digest in names.items():
        _ask(engine, rng, name, sizes.prompt // 8, 2, digest)
    _until_first(engine, set(names))


def _ask(
    engine: Engine, rng: random.Random, name: str, prompt: int, output: int, digest: str | None
) -> None:
    tokens = tuple(rng.randrange(3, engine.shape.vocab) for _ in range(max(prompt, 1)))
    sampling = Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)
    engine.add(NewRequest(name, tokens, sampling, digest))


def _until_first(engine: Engine, names: set[str]) -> None:
    """Steps until each has its first token."""
    waiting = set(names)
    while waiting:
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            waiting.discard(delta.request_id)
