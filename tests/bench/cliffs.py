"""Loads that once made a step of the scheduler take many times longer; for `tests.bench.scheduler`.

Each is built at the size at which it was found, which has a goal, and at five times that, which
shows the growth.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.costs import Costs
from replica.scheduling import victims
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.extents import Extents
from replica.scheduling.loads import Switches
from replica.scheduling.pages import Pages
from replica.scheduling.request import NewRequest, Sampled, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing

PLACES = 64
IMAGE_BYTES = 2**18
STEPS = 60


@dataclass(frozen=True, slots=True)
class Cliff:
    """measure: size → milliseconds of CPU time, one for each step (or call)."""

    name: str
    size: int
    goal_ms: float
    measure: Callable[[int], list[float]]


def rows(only: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and figures of each cliff whose name has `only` in it."""
    for cliff in CLIFFS:
        for times in (1, 5):
            name = cliff.name.format(cliff.size * times)
            if only in name:
                took_ms = sorted(cliff.measure(cliff.size * times))
                figures = {
                    "median_ms": round(statistics.median(took_ms), 3),
                    "p90_ms": round(took_ms[math.ceil(len(took_ms) * 0.9) - 1], 3),
                }
                yield name, figures | ({"goal_ms": cliff.goal_ms} if times == 1 else {})


def shared_prefix(waiting: int) -> list[float]:
    """Pages are nearly gone. The waiting prompts share 2,000 tokens."""
    core = scheduler(adapters=0, pages=450, sharing=Sharing())
    for i in range(PLACES + waiting):
        add(core, f"r{i}", None, (*range(2000), *range(10_000 + 30 * i, 10_030 + 30 * i)), 400)
    steps(core, 0.0, 0.1, 30)
    took_ms = steps(core, 3.0, 0.1, STEPS)
    assert core.running_set.short_of_pages and len(core.waiting) >= waiting
    return took_ms


def starving(adapters: int) -> list[float]:
    """All adapters have had a turn and want another, but no slice is over."""
    core = scheduler(adapters, pages=200 * adapters, sharing=Sharing(quantum_s=1.0))
    for i, digest in enumerate(core.adapter_cache.adapters):
        add(core, f"r{i}", digest, tuple(range(10 * i, 10 * i + 4)), 2000)
    now_s = 0.0
    while any(not request.begun for request in core.waiting):
        steps(core, now_s, 1.1, 10)
        now_s += 11.0
    steps(core, now_s, 1e-4, 20)
    took_ms = steps(core, now_s + 20e-4, 1e-4, STEPS)
    assert len(core.waiting) == adapters - PLACES
    return took_ms


def draining(adapters: int) -> list[float]:
    """Each place is drained for a starving adapter, and as many more starve."""
    sharing = Sharing(park=False, drain_wait_threshold_s=0.5)
    core = scheduler(PLACES + adapters, pages=200 * PLACES, sharing=sharing)
    digests = list(core.adapter_cache.adapters)
    for i, digest in enumerate(digests[:PLACES]):
        add(core, f"r{i}", digest, tuple(range(10 * i, 10 * i + 4)), 2000)
    steps(core, 0.0, 0.1, 30)
    for i, digest in enumerate(digests[PLACES:]):
        add(core, f"s{i}", digest, tuple(range(-10 * i - 4, -10 * i)), 100, 3.0)
    steps(core, 4.0, 0.01, 20)
    took_ms = steps(core, 4.2, 0.01, STEPS)
    assert len(core.drainer.drains) == PLACES and len(core.waiting) == adapters
    return took_ms


def registering(adapters: int) -> list[float]:
    """One more adapter, when so many are known: the check for room, and the registration."""
    cache = scheduler(adapters, pages=100, sharing=Sharing()).adapter_cache
    took_ms = []
    for i in range(200):
        start_s = time.thread_time()
        assert cache.refusal(f"new{i}", IMAGE_BYTES, False) is None
        cache.register(f"new{i}", "/", IMAGE_BYTES, pinned=False, now_s=0.0)
        took_ms.append((time.thread_time() - start_s) * 1e3)
    return took_ms


CLIFFS = (
    Cliff("{:,} wait for pages, with one prefix", 1000, 2.0, shared_prefix),
    Cliff("{:,} starving adapters, no slice over", 1000, 2.0, starving),
    Cliff("{:,} starving adapters, park off, drains", 1000, 2.0, draining),
    Cliff("{:,} adapters known: a register", 10_000, 0.1, registering),
)


def scheduler(adapters: int, pages: int, sharing: Sharing) -> Scheduler:
    costs = Costs(copy_bytes_per_s=50e9, decode_s=0.01, prefill_token_s=1e-7)
    cache = AdapterCache(
        Extents(PLACES * IMAGE_BYTES), PLACES, victims.cost, costs.copy_s, 1.0, 60.0
    )
    for i in range(adapters):
        cache.register(f"{i:064x}", "/", IMAGE_BYTES, pinned=False, now_s=0.0)
    limits = Limits(256, 2048, 10**6, PLACES, context=8192)
    return Scheduler(limits, Pages(pages, 16), cache, costs, Switches(), sharing)


def add(
    core: Scheduler,
    name: str,
    digest: str | None,
    prompt: tuple[int, ...],
    max_tokens: int,
    now_s: float = 0.0,
) -> None:
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    core.add(NewRequest(name, prompt, sampling, digest), now_s)


def steps(core: Scheduler, start_s: float, step_s: float, count: int) -> list[float]:
    """Milliseconds of CPU time of each step. Loads end at once."""
    took_ms = []
    for step in range(count):
        now_s = start_s + step * step_s
        before_s = time.thread_time()
        plan = core.step(now_s)
        took_ms.append((time.thread_time() - before_s) * 1e3)
        core.commit(plan, [Sampled(7) if work.sample else None for work in plan.rows], now_s)
        for change in plan.arena_changes:
            if change.load is not None:
                core.loaded(change.load.digest, now_s)
    return took_ms
