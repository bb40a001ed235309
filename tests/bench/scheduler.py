"""The scheduler's CPU time a step, and its growth with size: `python -m tests.bench.scheduler`.

The batch is full, and a long queue names many adapters. Each finished request is replaced at once,
so that the sizes stay as stated. A tenth of the requests name the base model; half of the others
name one of the hottest adapters, which are as many as the places. A load lasts 5 steps, and a step
10 ms of virtual time. Measures `step` (makes the plan) and `commit` (takes in the tokens) in
microseconds of CPU time of this thread, with the garbage collector set as in the engine's process.
The goal for both is 500 µs at the stated size. `sent` is the time to pickle what a step yields for
the server's process. Then come the cliffs (`cliffs.py`), in milliseconds.
"""

import argparse
import json
import pickle
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.costs import Costs
from replica.engine.engine_process import calm_collector
from replica.scheduling import victims
from replica.scheduling.adapter import Load
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.loads import Switches
from replica.scheduling.pages import Pages
from replica.scheduling.request import NewRequest, Sampled, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.share import Share
from replica.scheduling.timeline import Event
from replica.scheduling.turns import Sharing
from tests.bench import cliffs, processor

STEP_S = 0.01
LOAD_STEPS = 5


@dataclass(frozen=True, slots=True)
class Size:
    """pages: KV pages of 16 tokens; a request takes about 8. None: enough for all rows.

    shared: adapters and KV pages share one memory of `pages` pages (`scheduling/budget.py`).
    """

    name: str
    running: int = 256
    waiting: int = 2000
    adapters: int = 1000
    places: int = 64
    pages: int | None = None
    fair: bool = False
    shared: bool = False


SIZES = (
    Size("the stated size"),
    Size("half the batch", running=128),
    Size("twice the batch", running=512),
    Size("half the queue", waiting=1000),
    Size("twice the queue", waiting=4000),
    Size("half the adapters", adapters=500),
    Size("twice the adapters", adapters=2000),
    Size("16 places", adapters=100, places=16),
    Size("250 places", places=250),
    Size("pages run short", pages=1200),
    Size("one memory, short", pages=1300, shared=True),
    Size("fair share", fair=True),
)


class Bench:
    """A scheduler kept at one size."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.rng = random.Random(seed)
        limits = Limits(size.running, 2048, 100 * size.waiting, 4, context=4096)
        costs = Costs(copy_bytes_per_s=50e9, decode_s=STEP_S)
        pages = Pages(size.pages or size.running * 16, 16)
        extents = Extents(0 if size.shared else size.places * 64 * 4096)
        budget = Budget(extents, pages, 2**17, 256, 16) if size.shared else None
        adapter_cache = AdapterCache(
            extents, 255, victims.cost, costs.copy_s, 1.0, 60.0, budget=budget
        )
        for i in range(size.adapters):
            ranks = self.rng.choice([8, 16, 32, 64])
            adapter_cache.register(f"{i:064x}", "/", ranks * 4096, pinned=False, now_s=0.0)
        self.digests = sorted(adapter_cache.adapters)
        self.core = Scheduler(
            limits,
            pages,
            adapter_cache,
            costs,
            Switches(),
            Sharing(),
            Share(on=size.fair),
        )
        self.copies: list[tuple[int, Load]] = []
        self.count = 0
        self.steps = 0
        self.rows = 0  # of the last step

    def fill(self) -> None:
        """Adds requests up to the stated size."""
        count = self.size.running + self.size.waiting
        while len(self.core.waiting) + len(self.core.running_set.running) < count:
            name = f"r{self.count}"
            self.count += 1
            prompt = tuple(self.rng.randrange(32000) for _ in range(self.rng.randint(1, 128)))
            sampling = Sampling(max_tokens=self.rng.randint(1, 128), ignore_eos=True)
            drawn = self.rng.random()
            some = self.digests if drawn < 0.55 else self.digests[: self.size.places]
            digest = None if drawn < 0.1 else self.rng.choice(some)
            self.core.add(NewRequest(name, prompt, sampling, digest), self.steps * STEP_S)

    def step(self) -> tuple[float, float, float]:
        """CPU seconds that `step`, `commit` and sending took."""
        self.fill()
        now_s = self.steps * STEP_S
        while self.copies and self.copies[0][0] <= self.steps:
            self.core.loaded(self.copies.pop(0)[1].digest, now_s)
        start_s = time.thread_time()
        plan = self.core.step(now_s)
        planned_s = time.thread_time()
        chosen = [Sampled(7) if work.sample else None for work in plan.rows]
        chosen_s = time.thread_time()
        outputs = self.core.commit(plan, chosen, now_s)
        committed_s = time.thread_time()
        pickle.dumps(outputs, pickle.HIGHEST_PROTOCOL)
        sent_s = time.thread_time() - committed_s
        took_s = planned_s - start_s, committed_s - chosen_s, sent_s
        loads = [change.load for change in plan.arena_changes if change.load is not None]
        self.copies += [(self.steps + LOAD_STEPS, load) for load in loads]
        self.steps += 1
        self.rows = len(plan.rows)
        return took_s


def measure(size: Size, steps: int, seed: int = 0) -> dict[str, float]:
    bench = Bench(size, seed)
    for _ in range(steps):
        bench.step()
    calm_collector()
    took, rows = [], []
    for _ in range(steps):
        took.append(bench.step())
        rows.append(bench.rows)
    steps_s, commits_s, sends_s = zip(*took, strict=True)
    both_us = sorted((a + b) * 1e6 for a, b in zip(steps_s, commits_s, strict=True))
    return {
        "rows": statistics.median(rows),
        "waiting": len(bench.core.waiting),
        "step_us": round(statistics.median(steps_s) * 1e6, 1),
        "commit_us": round(statistics.median(commits_s) * 1e6, 1),
        "both_us": round(statistics.median(both_us), 1),
        "both_p99_us": round(both_us[int(steps * 0.99)], 1),
        "sent_us": round(statistics.median(sends_s) * 1e6, 1),
        "parked": bench.core.timelines.counts[Event.PARKED],
        "loads": bench.core.timelines.counts[Event.LOAD_STARTED],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", default="", help="a part of the name of a size or cliff")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for size in SIZES:
        if options.only in size.name:
            show(size.name, measure(size, options.steps), options.json)
    calm_collector()
    for name, figures in cliffs.rows(options.only):
        show(name, figures, options.json)
    if not options.json:
        print(processor.shown())


def show(name: str, figures: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"size": name, **figures}), flush=True)
    else:
        values = "  ".join(f"{figure} {value:g}" for figure, value in figures.items())
        print(f"{name:42} {values}", flush=True)


if __name__ == "__main__":
    main()
