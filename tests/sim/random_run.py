"""One random life of a scheduler, drawn from a seed: arrivals, cancels, failing loads, tiny arenas.

Every invariant is checked after every step; when the faults are over, all work ends.
"""

import dataclasses
import random

from cluster.costs import Costs
from cluster.errors import FleetError
from replica.adapter import Load
from replica.drainer import Sharing
from replica.eviction import ORDERS
from replica.extents import Extents
from replica.host_tier import HostTier
from replica.loads import Switches
from replica.pages import Pages
from replica.request import NewRequest, Phase, Sampling
from replica.residency import Residency
from replica.scheduler import Chosen, Limits, Plan, Scheduler, Work
from replica.share import Share


class Run:
    """A scheduler, and around it everything that can happen to one, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        rng = self.rng
        limits = Limits(
            batch_rows_max=rng.randint(1, 8),
            step_tokens_max=rng.randint(8, 64),
            queue_max=20,
            loads_in_flight_max=rng.randint(1, 3),
            context=rng.randint(32, 96),
            eos_tokens=frozenset({2}),
            parked_pages_max=rng.choice([None, 0, 5]),
            page_wait_max_s=rng.choice([0.0, 0.3, 2.0]),
        )
        costs = Costs(copy_bytes_per_s=rng.choice([200.0, 2000.0]), decode_s=0.05)
        sharing = Sharing(
            park=self.chance(0.6),
            quantum_s=rng.choice([0.1, 0.5]),
            drain_wait_threshold_s=rng.choice([0.0, 0.2]),
        )
        switches = Switches(
            base_pinned=self.chance(0.8),
            skip=self.chance(0.8),
            overlap=self.chance(0.8),
            prefetch_depth=rng.choice([0, 1, 8]),
        )
        residency = Residency(
            Extents(rng.randint(60, 200), 1),
            rng.randint(1, 6),
            ORDERS[rng.choice(sorted(ORDERS))],
            costs.copy_s,
            0.2,
            1.0,
            HostTier(rng.choice([0, 100])),
        )
        pages = Pages(rng.randint(6, 20), 16)
        share = Share({"a": 2.0}, on=self.chance(0.3))
        self.core = Scheduler(limits, pages, residency, costs, switches, sharing, share)
        self.loads: list[Load] = []
        self.contents: dict[int, str] = {}  # slot → digest whose weights are there
        self.cache: dict[tuple[int, int], tuple[str | None, int]] = {}  # page, offset → written
        self.open: set[str] = set()
        self.ended: set[str] = set()
        self.now_s = 0.0
        self.count = 0

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def events(self) -> None:
        core, rng = self.core, self.rng
        if self.chance(0.1):
            digest = rng.choice("abcdefgh")
            pinned = self.chance(0.05)
            core.residency.register(digest, "/", rng.randint(1, 60), pinned, now_s=self.now_s)
        if self.chance(0.02) and core.residency.adapters:
            core.forget(rng.choice([d for d in sorted(core.residency.adapters) if d] or ["x"]))
        if self.chance(0.5):
            self.arrive()
        if self.chance(0.05) and self.open:
            victim = rng.choice(sorted(self.open))
            assert core.cancel(victim, self.now_s)
            self.end(victim)

    def unpin(self) -> None:
        for adapter in list(self.core.residency.adapters.values()):
            if adapter.pinned and not adapter.leaving:
                self.core.residency.register(adapter.digest, "/", adapter.bytes, False, self.now_s)

    def arrive(self) -> None:
        rng = self.rng
        digest = rng.choice([None, None, *"abcdefgh"])
        name = f"r{self.count}"
        self.count += 1
        sampling = Sampling(max_tokens=rng.randint(1, 40))
        first = rng.choice([0, 0, 1])
        prompt = tuple(range(first, first + rng.randint(1, 60)))
        try:
            self.core.add(
                NewRequest(name, prompt, sampling, digest, rng.choice([0, 0, 1])), self.now_s
            )
        except FleetError:
            return
        self.open.add(name)

    def end(self, name: str) -> None:
        assert name in self.open and name not in self.ended, f"{name} ended twice"
        self.open.remove(name)
        self.ended.add(name)

    def finish_loads(self, faults: bool) -> None:
        for load in list(self.loads):
            if faults and not self.chance(0.4):
                continue
            self.loads.remove(load)
            if faults and self.chance(0.2):
                self.core.load_failed(load.digest, "fault", self.now_s)
            else:
                self.contents[load.slot] = load.digest
                self.core.loaded(load.digest, self.now_s)
        self.clear()

    def clear(self) -> None:
        """One whose load was lost may leave a slot that nothing came to."""
        for evict in self.core.evictions():
            assert self.contents.pop(evict.slot, evict.digest) == evict.digest

    def step(self, faults: bool) -> None:
        self.finish_loads(faults)
        plan = self.core.step(self.now_s)
        self.core.check()
        for room in plan.rooms:
            for evict in room.evictions:
                assert self.contents.pop(evict.slot, evict.digest) == evict.digest
            in_flight = {load.slot for load in self.loads}
            moved = {move.slot for move in room.moves}
            assert in_flight.isdisjoint(moved), "a copy's target moved"
            assert moved <= set(self.contents), "what is not there cannot move"
            if self.core.switches.overlap:
                self.loads.append(room.load)
            else:
                plan = self.carry_out(plan, room.load, faults)
        self.right_weights(plan)
        chosen = [Chosen(self.rng.choice([2, 5, 6, 7])) if w.sample else None for w in plan.rows]
        deltas = [*plan.failed, *self.core.commit(plan, chosen, self.now_s)]
        for delta in deltas:
            if delta.last:
                self.end(delta.request_id)
        self.core.check()
        self.clear()
        self.now_s += 0.05

    def carry_out(self, plan: Plan, load: Load, faults: bool) -> Plan:
        """Without overlap: the batch waits, and runs without those whose load has failed."""
        if not (faults and load.digest and self.chance(0.1)):
            self.contents[load.slot] = load.digest
            return plan
        for delta in self.core.lost(load.digest, "fault", self.now_s):
            self.end(delta.request_id)
        self.core.check()
        rows = tuple(w for w in plan.rows if w.request.phase is Phase.RUNNING)
        return dataclasses.replace(plan, rows=rows)

    def right_weights(self, plan: Plan) -> None:
        for work in plan.rows:
            weights = self.contents[work.slot] if work.slot else None
            assert weights == work.request.digest, f"{work.request.id} ran with {weights}"
            self.right_pages(work)

    def right_pages(self, work: Work) -> None:
        """What it attends to are its own tokens, computed with its own weights."""
        request, size = work.request, self.core.pages.page_tokens
        for position, token in enumerate(request.slice(0, work.end)):
            at = request.pages[position // size], position % size
            if position >= work.start:
                self.cache[at] = request.digest, token
            assert self.cache.get(at) == (request.digest, token), f"{request.id} at {position}"


def live(seed: int) -> None:
    """Raises AssertionError, naming the seed."""
    run = Run(seed)
    try:
        for _ in range(120):
            run.events()
            run.step(faults=True)
        run.unpin()
        for _ in range(4000):
            if not run.core.has_work:
                break
            run.step(faults=False)
        assert not run.core.has_work, "work is left though the faults are over"
        assert run.core.pages.free == run.core.pages.capacity
    except (AssertionError, LookupError) as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__} {error}") from error
