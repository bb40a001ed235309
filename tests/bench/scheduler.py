"""What one step of the scheduler costs, and how that grows: `python -m tests.bench.scheduler`.

A full batch over a few places, a long queue over many adapters: what ends is replaced at once, so
that the sizes stay as stated. Loads last 5 steps, steps 10 ms of virtual time; what is measured are
`step` (makes the plan) and `commit` (takes in the tokens), in microseconds of real time.
"""

import argparse
import gc
import json
import random
import statistics
import time
from dataclasses import dataclass

from cluster.costs import Costs
from replica import eviction
from replica.adapter import Load
from replica.admission import Limits
from replica.drainer import Sharing
from replica.extents import Extents
from replica.loads import Switches
from replica.pages import Pages
from replica.request import NewRequest, Sampled, Sampling
from replica.residency import Residency
from replica.scheduler import Scheduler
from replica.share import Share
from replica.story import Event

STEP_S = 0.01
LOAD_STEPS = 5


@dataclass(frozen=True, slots=True)
class Size:
    """pages: of 16 tokens, of which a request takes about 8; None: enough for all rows."""

    name: str
    running: int = 256
    waiting: int = 2000
    adapters: int = 1000
    places: int = 64
    pages: int | None = None
    fair: bool = False


SIZES = (
    Size("the stated size"),
    Size("half the batch", running=128),
    Size("twice the batch", running=512),
    Size("half the queue", waiting=1000),
    Size("twice the queue", waiting=4000),
    Size("half the adapters", adapters=500),
    Size("twice the adapters", adapters=2000),
    Size("16 places", places=16),
    Size("250 places", places=250),
    Size("pages run short", pages=1200),
    Size("fair share", fair=True),
)


class Bench:
    """A scheduler kept at one size."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.rng = random.Random(seed)
        limits = Limits(size.running, 2048, 100 * size.waiting, 4, context=4096)
        costs = Costs(copy_bytes_per_s=50e9, decode_s=STEP_S)
        residency = Residency(
            Extents(size.places * 64 * 4096),
            255,
            eviction.cost,
            costs.copy_s,
            1.0,
            60.0,
        )
        for i in range(size.adapters):
            ranks = self.rng.choice([8, 16, 32, 64])
            residency.register(f"{i:064x}", "/", ranks * 4096, pinned=False, now_s=0.0)
        self.digests = sorted(residency.adapters)
        self.core = Scheduler(
            limits,
            Pages(size.pages or size.running * 16, 16),
            residency,
            costs,
            Switches(),
            Sharing(),
            Share(on=size.fair),
        )
        self.copies: list[tuple[int, Load]] = []
        self.count = 0
        self.steps = 0

    def fill(self) -> None:
        want = self.size.running + self.size.waiting
        while len(self.core.waiting) + len(self.core.batch.running) < want:
            name = f"r{self.count}"
            self.count += 1
            prompt = tuple(self.rng.randrange(32000) for _ in range(self.rng.randint(1, 128)))
            sampling = Sampling(max_tokens=self.rng.randint(1, 128), ignore_eos=True)
            digest = None if self.rng.random() < 0.1 else self.rng.choice(self.digests)
            self.core.add(NewRequest(name, prompt, sampling, digest), self.steps * STEP_S)

    def step(self) -> tuple[float, float]:
        """Seconds of real time that `step` and `commit` took."""
        self.fill()
        now_s = self.steps * STEP_S
        while self.copies and self.copies[0][0] <= self.steps:
            self.core.loaded(self.copies.pop(0)[1].digest, now_s)
        start_s = time.perf_counter()
        plan = self.core.step(now_s)
        planned_s = time.perf_counter()
        chosen = [Sampled(7) if work.sample else None for work in plan.rows]
        chosen_s = time.perf_counter()
        self.core.commit(plan, chosen, now_s)
        took_s = planned_s - start_s, time.perf_counter() - chosen_s
        self.copies += [(self.steps + LOAD_STEPS, room.load) for room in plan.rooms]
        self.steps += 1
        return took_s


def measure(size: Size, steps: int, seed: int = 0) -> dict[str, float]:
    bench = Bench(size, seed)
    for _ in range(steps):
        bench.step()
    gc.collect()
    took = [bench.step() for _ in range(steps)]
    both_us = sorted((step_s + commit_s) * 1e6 for step_s, commit_s in took)
    return {
        "running": len(bench.core.batch.running),
        "waiting": len(bench.core.waiting),
        "step_us": round(statistics.median(step_s for step_s, _ in took) * 1e6, 1),
        "commit_us": round(statistics.median(commit_s for _, commit_s in took) * 1e6, 1),
        "both_us": round(statistics.median(both_us), 1),
        "both_p99_us": round(both_us[int(steps * 0.99)], 1),
        "parked": bench.core.stories.counts[Event.PARKED],
        "loads": bench.core.stories.counts[Event.LOAD_STARTED],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", help="a part of a size's name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for size in SIZES:
        if options.only and options.only not in size.name:
            continue
        row = measure(size, options.steps)
        if options.json:
            print(json.dumps({"size": size.name, **row}), flush=True)
        else:
            told = "  ".join(f"{name} {value:g}" for name, value in row.items())
            print(f"{size.name:20} {told}", flush=True)


if __name__ == "__main__":
    main()
