"""Hypothesis applies rules in any order, looking for a run that breaks an invariant.

Derandomized: the same runs every time, as many as take a few seconds.
"""

from collections import deque
from collections.abc import Iterable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from cluster.errors import FleetError
from cluster.values import Tier
from replica.scheduling import victims
from replica.scheduling.adapter import Load
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.extents import Extents
from replica.scheduling.host_tier import HostTier
from replica.scheduling.loads import Switches
from replica.scheduling.pages import Pages, Prefix
from replica.scheduling.plan import Plan
from replica.scheduling.request import ENDED, Delta, NewRequest, Sampled, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import STEP_S, scheduler
from tests.sim.memory import Memory

SETTINGS = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
DIGESTS = st.sampled_from("abcdef")


class PagesMachine(RuleBasedStateMachine):
    """Checked against a model: what each page was last filled with, and what came before it."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(8, page_tokens=2)
        self.holders: list[list[int]] = []
        self.filled: dict[int, tuple[str | None, tuple[int, ...]]] = {}
        self.remembered: tuple[str | None, tuple[int, ...], Prefix] | None = None

    @rule(target=held, root=st.sampled_from([None, "x", "y"]), length=st.integers(1, 4))
    def compute(self, root: str | None, length: int) -> object:
        """A prompt of few different tokens: match its prefix, compute and publish the rest."""
        tokens = [(i * length) % 3 for i in range(2 * length)]
        prefix = self.pages.match(root, tokens)
        for index, page in enumerate(prefix.pages):
            assert self.filled[page] == (root, tuple(tokens[: 2 * index + 2])), "a wrong prefix"
        free = self.pages.free
        rest = self.pages.take(length - len(prefix.pages))
        if rest is None:
            assert length - len(prefix.pages) > free == self.pages.free
            self.pages.give_back(prefix.pages)
            return multiple()
        link = prefix.link
        for index, page in enumerate(rest, len(prefix.pages)):
            self.filled[page] = root, tuple(tokens[: 2 * index + 2])
            link = self.pages.publish(link, tokens[2 * index : 2 * index + 2], page)
        pages = [*prefix.pages, *rest]
        self.holders.append(pages)
        return pages

    @rule(root=st.sampled_from([None, "x", "y"]), length=st.integers(1, 4))
    def remember(self, root: str | None, length: int) -> None:
        tokens = tuple((i * length) % 3 for i in range(2 * length))
        prefix = self.pages.match(root, tokens)
        self.pages.give_back(prefix.pages)
        self.remembered = root, tokens, prefix

    @precondition(lambda self: self.remembered is not None)
    @rule()
    def check_the_remembered(self) -> None:
        """An earlier match is the longest exactly if `match` finds the same."""
        root, tokens, prefix = self.remembered
        start = 2 * len(prefix.pages)
        still = self.pages.still_longest(prefix, tokens[start : start + 2])
        unheld, free = self.pages.unheld(prefix), self.pages.free
        found = self.pages.match(root, tokens)
        assert still == (found == prefix)
        assert not still or unheld == free - self.pages.free
        self.pages.give_back(found.pages)

    @rule(pages=consumes(held))
    def end(self, pages: list[int]) -> None:
        # By identity: two lists may hold the same prefix and nothing else.
        self.holders = [other for other in self.holders if other is not pages]
        self.pages.give_back(pages)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The arena takes the lowest pages; their contents are copied."""
        first = self.pages.first
        first += data.draw(st.integers(0, min(self.pages.free, self.pages.total - first)))
        renamed = self.pages.give_up(first)
        assert renamed.keys().isdisjoint(renamed.values())
        assert all(old < first <= new for old, new in renamed.items())
        for old, new in renamed.items():
            self.filled[new] = self.filled.pop(old)
        for pages in self.holders:
            pages[:] = [renamed.get(page, page) for page in pages]

    @rule(data=st.data())
    def get_back(self, data: st.DataObject) -> None:
        self.pages.get_back(data.draw(st.integers(0, self.pages.first)))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pages.check(self.holders)


class AdapterCacheMachine(RuleBasedStateMachine):
    """Claims, rows, loads and evictions in any legal order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.cache = AdapterCache(
            Extents(100, 1), 4, victims.cost, lambda size, _: size / 100, 1.0, 8.0, HostTier(60)
        )
        self.contents: dict[int, str] = {}
        self.in_flight: set[str] = set()

    def wanted(self) -> list[str]:
        return sorted(d for d, a in self.cache.adapters.items() if a.wanted)

    def used(self) -> list[str]:
        return sorted(d for d, a in self.cache.adapters.items() if a.users)

    @rule(digest=DIGESTS, size=st.integers(1, 60), pinned=st.booleans())
    def register(self, digest: str, size: int, pinned: bool) -> None:
        self.cache.register(digest, "/", size, pinned, self.now_s)

    @rule(digest=DIGESTS)
    def forget(self, digest: str) -> None:
        self.clear(self.cache.forget(digest))

    @rule(digest=DIGESTS)
    def claim(self, digest: str) -> None:
        adapter = self.cache.adapters.get(digest)
        if adapter is not None and not adapter.leaving:
            self.cache.claim(digest, self.now_s)

    @precondition(lambda self: self.wanted())
    @rule(data=st.data(), dt=st.floats(0, 2))
    def run_or_cancel(self, data: st.DataObject, dt: float) -> None:
        self.now_s += dt
        digest = data.draw(st.sampled_from(self.wanted()))
        if self.cache.usable(digest) and data.draw(st.booleans()):
            assert self.contents[self.cache.slot(digest)] == digest
            self.cache.acquire(digest, self.now_s)
        else:
            self.clear(self.cache.unclaim(digest))

    @precondition(lambda self: self.used())
    @rule(data=st.data(), ends=st.booleans())
    def stop(self, data: st.DataObject, ends: bool) -> None:
        digest = data.draw(st.sampled_from(self.used()))
        self.cache.release(digest, self.now_s)
        if ends:
            self.clear(self.cache.unclaim(digest))

    @rule(digest=DIGESTS)
    def load(self, digest: str) -> None:
        adapter = self.cache.adapters.get(digest)
        if adapter is None or adapter.tier in (Tier.DEVICE, Tier.LOADING):
            return
        victims = self.cache.victim_search.for_image(digest)
        if victims is None:
            return
        for victim in victims:
            gone = self.cache.adapters[victim]
            assert not gone.users and not gone.pinned and gone.tier is Tier.DEVICE
            assert not (gone.fresh and gone.wanted), "it was loaded for a waiting request"
        change = self.cache.make_room(digest, victims, self.now_s)
        assert [e.digest for e in change.evictions] == victims
        self.clear(change.evictions)
        busy = {self.cache.slot(d) for d in self.in_flight}
        assert busy.isdisjoint(m.slot for m in change.slides), "a copy's target moved"
        assert change.load.slot not in self.contents
        self.in_flight.add(digest)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), good=st.booleans(), kept=st.booleans())
    def copied(self, data: st.DataObject, good: bool, kept: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.in_flight.remove(digest)
        adapter = self.cache.adapters[digest]
        if not good:
            self.cache.failed(digest, "broken", self.now_s)
            return
        if kept and digest not in self.cache.host and adapter.bytes <= 60:
            self.cache.keep_on_host(digest)
        self.contents[self.cache.slot(digest)] = digest
        self.clear(self.cache.loaded(digest, self.now_s))

    @invariant()
    def whole(self) -> None:
        self.cache.check()
        for adapter in self.cache.adapters.values():
            starves = adapter.wanted and adapter.tier is not Tier.DEVICE
            assert (adapter.starved_s is not None) == starves

    def clear(self, evictions: object) -> None:
        for evict in evictions:  # type: ignore[attr-defined]
            assert self.contents.pop(evict.slot) == evict.digest


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler with any settings: every request ends once, with its own weights."""

    sharing = Sharing()

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.number = 0
        self.open: set[str] = set()
        self.launched_steps: deque[tuple[Plan, list[list[int]]]] = deque()
        self.page_copies: list[int] = []

    @initialize(
        depth=st.integers(1, 2),
        skip=st.booleans(),
        overlap=st.booleans(),
        pinned=st.booleans(),
        rows=st.integers(1, 4),
        pages=st.integers(5, 12),
        parked=st.sampled_from([None, 0, 4]),
        page_bytes=st.sampled_from([None, None, 10, 15]),
        headroom=st.integers(0, 3),
        host_pages=st.sampled_from([0, 2, 12]),
    )
    def assemble(
        self,
        depth: int,
        skip: bool,
        overlap: bool,
        pinned: bool,
        rows: int,
        pages: int,
        parked: int | None,
        page_bytes: int | None,
        headroom: int,
        host_pages: int,
    ) -> None:
        self.depth = depth
        self.core: Scheduler = scheduler(
            rows=rows,
            tokens=24,
            queue=6,
            pages=pages if page_bytes is None else pages + 8,
            slots=3 if page_bytes is None else 5,
            context=64,
            sizes=dict(zip("abcdef", (40, 40, 20, 60, 90, 10), strict=True)),
            switches=Switches(
                base_slot="pinned" if pinned else "shared",
                on_miss="skip" if skip else "block",
                overlap=overlap,
                prefetch_depth=2,
            ),
            sharing=self.sharing,
            parked_pages_max=parked,
            page_wait_max_s=0.2,
            page_bytes=page_bytes,
            headroom=headroom,
            host_pages=host_pages,
        )
        self.memory = Memory(self.core)

    @rule(
        digest=st.one_of(st.none(), DIGESTS),
        prompt=st.integers(1, 40),
        tokens=st.integers(1, 24),
        priority=st.integers(0, 1),
    )
    def arrive(self, digest: str | None, prompt: int, tokens: int, priority: int) -> None:
        name = f"r{self.number}"
        self.number += 1
        sampling = Sampling(max_tokens=tokens, grammar="any" if self.number % 3 == 0 else None)
        new = NewRequest(name, tuple(range(prompt)), sampling, digest, priority)
        try:
            self.core.add(new, self.now_s)
        except FleetError:
            return
        self.open.add(name)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        assert self.core.cancel(name, self.now_s)
        self.open.remove(name)

    @rule(steps=st.integers(1, 8), copies=st.booleans(), broken=st.booleans())
    def run_steps(self, steps: int, copies: bool, broken: bool) -> None:
        """broken: without overlap the loads of the last step fail."""
        for left in reversed(range(steps)):
            if copies:
                self.end_copies(good=True)
                self.end_page_copies()
            self.step(broken and not left)

    @precondition(lambda self: self.memory.copies)
    @rule(good=st.booleans())
    def end_copies(self, good: bool) -> None:
        for load in list(self.memory.copies):
            self.memory.end(load, good)
            if good:
                self.core.loaded(load.digest, self.now_s)
            else:
                self.core.load_failed(load.digest, "broken", self.now_s)

    def end_page_copies(self) -> None:
        while self.page_copies:
            self.end_page_copy(last=False)

    @precondition(lambda self: self.page_copies)
    @rule(last=st.booleans())
    def end_page_copy(self, last: bool) -> None:
        """They end in any order."""
        number = self.page_copies.pop(-1 if last else 0)
        self.memory.end_copy(number)
        self.core.pages_copied(number, self.now_s)

    def step(self, broken: bool = False) -> None:
        core = self.core
        plan = core.step(self.now_s)
        core.check()
        self.receive(plan.failed)
        if plan.waits:
            self.commit()
        for change in plan.arena_changes:
            self.memory.make(change)
            if change.load is not None:
                self.memory.begin(change.load)
                if not core.switches.overlap:
                    self.end_load(change.load, good=not broken or not change.load.digest)
        for copy in plan.page_copies:
            self.memory.begin_copy(copy)
            self.page_copies.append(copy.number)
        plan = core.without_ended(plan)
        if plan.rows:
            self.launched_steps.append((plan, [work.request.pages for work in plan.rows]))
        for launched, _ in self.launched_steps:
            self.check_weights(launched)
        if self.launched_steps and (len(self.launched_steps) == self.depth or not plan.rows):
            self.commit()
        self.now_s += STEP_S

    def end_load(self, load: Load, good: bool) -> None:
        self.memory.end(load, good)
        if not good:
            self.memory.lost.add(load.slot)
            self.receive(self.core.lost(load.digest, "broken", self.now_s))

    def commit(self) -> None:
        plan, pages = self.launched_steps.popleft()
        self.check_weights(plan)
        for work, held in zip(plan.rows, pages, strict=True):
            if work.request.phase not in ENDED:
                self.memory.compute(work, held)
        chosen = [Sampled(7) if work.sample else None for work in plan.rows]
        self.receive(self.core.commit(plan, chosen, self.now_s))

    def check_weights(self, plan: Plan) -> None:
        self.memory.check()
        for work in plan.rows:
            assert self.memory.weights(work.slot) == work.request.digest, (
                "it ran with the weights of another"
            )

    def receive(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            assert delta.request_id in self.open, "it has ended"
            if delta.last:
                self.open.remove(delta.request_id)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "core"):
            self.core.check()
            assert {r.id for r in self.core.waiting} | set(
                self.core.running_set.running
            ) == self.open

    def teardown(self) -> None:
        """Once the faults stop, all work ends."""
        if not hasattr(self, "core"):
            return
        for _ in range(3000):
            if not self.core.has_work:
                break
            self.end_copies(good=True)
            self.end_page_copies()
            self.step()
        assert not self.open, f"{sorted(self.open)} never ended"


class DrainerMachine(SchedulerMachine):
    """Without parking: a drained place goes to the starving adapter, and every drain ends."""

    sharing = Sharing(park=False, drain_wait_threshold_s=0.1)

    @invariant()
    def drains_are_right(self) -> None:
        if not hasattr(self, "core"):
            return
        adapter_cache, drains = self.core.adapter_cache, self.core.drainer.drains
        for victim, drain in drains.items():
            assert victim != drain.starving, "it drains itself"
            adapter = adapter_cache.adapters.get(victim)
            assert adapter is None or not adapter.pinned

    def step(self, broken: bool = False) -> None:
        drainer = self.core.drainer
        before = dict(drainer.drains)
        running = set(self.core.running_set.running)
        super().step(broken)
        for request in self.core.running_set.running.values():
            drain = before.get(request.adapter_key or "none")
            still = drain is not None and drainer.drains.get(request.adapter_key or "none") == drain
            if still and request.id not in running:
                assert drain is not None and request.id in drain.admitted, (
                    "the drain did not let it in"
                )
        for victim, drain in before.items():
            starving = self.core.adapter_cache.adapters.get(drain.starving)
            if starving is not None and starving.wanted and starving.slot is None:
                gone = not self.core.adapter_cache.usable(victim)
                assert not gone, "its place went to another adapter than the starving one"


PagesMachine.TestCase.settings = SETTINGS
AdapterCacheMachine.TestCase.settings = SETTINGS
SchedulerMachine.TestCase.settings = settings(SETTINGS, max_examples=150, stateful_step_count=30)
DrainerMachine.TestCase.settings = settings(SETTINGS, max_examples=150, stateful_step_count=30)
TestPages = PagesMachine.TestCase
TestAdapterCache = AdapterCacheMachine.TestCase
TestScheduler = SchedulerMachine.TestCase
TestDrainer = DrainerMachine.TestCase
