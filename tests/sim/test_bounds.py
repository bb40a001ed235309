"""No adapter waits longer for a place than the stated bound, whatever the arrivals; by seed.

Requests have enough pages and rows, so that a place is all they wait for. On top of
`Drainer.bound_s` a wait includes the step under way, and the head start that an adapter with no
token yet may get.
"""

import random

import pytest

from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import STEP_S, new, run, scheduler


class Crowd:
    """Long requests for more adapters than there are places, on a virtual clock."""

    def __init__(self, seed: int, sizes: dict[str, int], arena: int) -> None:
        self.rng = random.Random(seed)
        self.sizes = sizes
        self.arena = arena
        self.copies: list[tuple[float, str]] = []
        self.waits_s: list[float] = []
        self.now_s = 0.0
        self.count = 0
        self.core: Scheduler = scheduler(
            rows=400,
            tokens=1000,
            pages=4000,
            arena=arena,
            slots=len(sizes),
            sizes=sizes,
            copy_bytes_per_s=self.rng.choice([1000.0, 10000.0]),
            sharing=Sharing(quantum_s=self.rng.choice([0.3, 0.5])),
            loads=4,
        )

    def live(self, steps: int) -> None:
        for _ in range(steps):
            if self.rng.random() < 0.4:
                digest = self.rng.choice(sorted(self.sizes))
                name = f"r{self.count}"
                self.count += 1
                self.core.add(new(name, digest, max_tokens=self.rng.randint(1, 100)), self.now_s)
            self.step()

    def step(self) -> None:
        core = self.core
        for end_s, digest in list(self.copies):
            if end_s <= self.now_s:
                self.copies.remove((end_s, digest))
                core.loaded(digest, self.now_s)
        since = {d: a.starved_s for d, a in core.adapter_cache.adapters.items()}
        plan, _ = run(core, self.now_s)
        for change in plan.arena_changes:
            begun_s = max([self.now_s, *(end_s for end_s, _ in self.copies)])
            copy_s = core.costs.copy_s(change.load.bytes)
            self.copies.append((begun_s + copy_s, change.load.digest))
            starved_s = since[change.load.digest]
            assert starved_s is not None
            self.waits_s.append(self.now_s - starved_s)
        self.now_s += STEP_S

    def bound_s(self) -> float:
        """Each place fits the largest image. Smaller ones never need more."""
        largest = max(self.sizes.values())
        drainer = self.core.drainer
        bound_s = drainer.turns.bound_s(len(self.sizes), self.arena // largest, largest)
        return bound_s + 2 * STEP_S


@pytest.mark.parametrize("seed", range(6))
def test_equal_images_wait_within_the_bound(seed: int) -> None:
    crowd = Crowd(seed, dict.fromkeys("abcdefgh", 40), arena=120)
    crowd.live(400)
    assert len(crowd.waits_s) > 20
    assert max(crowd.waits_s) <= crowd.bound_s(), f"seed {seed}"


@pytest.mark.parametrize("seed", range(6))
def test_a_large_image_among_small_ones_waits_within_the_bound(seed: int) -> None:
    sizes = {**dict.fromkeys("abcdef", 10), "large": 40, "middle": 25}
    crowd = Crowd(seed, sizes, arena=45)
    crowd.live(600)
    assert len(crowd.waits_s) > 20
    assert max(crowd.waits_s) <= crowd.bound_s(), f"seed {seed}"
