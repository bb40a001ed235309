"""The real scheduler of one replica on a virtual clock, with a model of what the device takes.

    arrivals ──> scheduler.step ──> plan ──> the model gives its time ──> scheduler.commit ──> …

Deterministic: the same scheduler, arrivals and model give the same records.
"""

import heapq
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from cluster.values import Tier
from replica.scheduling.adapter import Load
from replica.scheduling.pages import PageCopy
from replica.scheduling.plan import Plan, Work
from replica.scheduling.request import NewRequest, Sampled, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.simulation.workloads import Arrival


class Model(Protocol):
    """What a device takes for its work, in seconds (`cards.py` has some)."""

    def step_s(self, rows: Sequence[Work], ranks: Mapping[str | None, int]) -> float: ...

    def copy_s(self, size: int, source: Tier = Tier.HOST) -> float: ...

    def move_s(self, size: int) -> float:
        """A move within the device's memory."""


@dataclass(slots=True)
class RequestStats:
    """One request, in seconds of virtual time."""

    arrival: Arrival
    first_s: float | None = None
    last_s: float = 0.0
    gap_max_s: float = 0.0
    tokens: int = 0

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrival.at_s

    @property
    def e2e_s(self) -> float:
        return self.last_s - self.arrival.at_s

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens; 0 for a single token."""
        return (self.e2e_s - self.ttft_s) / max(self.tokens - 1, 1)

    def token(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.gap_max_s = max(self.gap_max_s, now_s - self.last_s)
        self.last_s = now_s
        self.tokens += 1


@dataclass(slots=True)
class Simulator:
    """ranks: of each adapter.
    check: check the invariants after each step.
    depth: 2 plans a step when the one before it starts to run (`in_flight.py`), 1 when it has
        ended.
    mixed: prompts and decodes share one batch. Otherwise a step with prompts computes them alone,
        and decodes wait while any prompt can be computed, as in servers that never mix the two.
    """

    scheduler: Scheduler
    model: Model
    ranks: Mapping[str | None, int]
    check: bool = False
    mixed: bool = True
    depth: int = 1
    now_s: float = 0.0
    steps: int = 0
    _copies_end_s: list[float] = field(default_factory=lambda: [0.0, 0.0])  # to the device, from it
    _copies: list[tuple[float, int, Load | PageCopy, float]] = field(default_factory=list)
    _copies_begun: int = 0
    _records: dict[str, RequestStats] = field(default_factory=dict)
    _in_flight: deque[Plan] = field(default_factory=deque)

    def run(self, arrivals: Iterable[Arrival]) -> list[RequestStats]:
        """Run until all work has ended."""
        coming = sorted(arrivals, key=lambda a: a.at_s)
        number = 0
        while True:
            while number < len(coming) and coming[number].at_s <= self.now_s:
                self._arrive(f"r{number}", coming[number])
                number += 1
            self._end_copies()
            wake_s = self._step()
            if wake_s is None:
                continue
            ends = [copy[0] for copy in self._copies[:1]]
            times = [*ends, wake_s, *(a.at_s for a in coming[number : number + 1])]
            following = [t for t in times if t > self.now_s]
            if not following:
                assert not self.scheduler.has_work, "work is left, but nothing more will happen"
                return list(self._records.values())
            self.now_s = min(following)

    def _arrive(self, name: str, arrival: Arrival) -> None:
        sampling = Sampling(max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True)
        prompt = arrival.prompt(len(self._records))
        self._records[name] = RequestStats(arrival)
        self.scheduler.add(NewRequest(name, prompt, sampling, arrival.adapter), arrival.at_s)

    def _end_copies(self) -> None:
        while self._copies and self._copies[0][0] <= self.now_s:
            _, _, copy, copy_s = heapq.heappop(self._copies)
            if isinstance(copy, PageCopy):
                self.scheduler.costs.pages_copied(self._bytes(copy), copy_s)
                self.scheduler.pages_copied(copy.number, self.now_s)
                continue
            self._copied(copy, copy_s)
            self.scheduler.loaded(copy.digest, self.now_s)

    def _step(self) -> float | None:
        """None if rows ran; else when the next step may find some (infinity: after an event)."""
        plan = self.scheduler.step(self.now_s)
        ran = bool(plan.rows or self._in_flight)
        if plan.waits:
            self._commit()
        self._apply_arena_changes(plan)
        for page_copy in plan.page_copies:
            copied_s = self.model.copy_s(self._bytes(page_copy))
            self._begin_copy(page_copy, copied_s)
        if not self.mixed and any(work.end - work.start > 1 for work in plan.rows):
            plan = self.scheduler.without(plan, lambda work: work.end - work.start == 1)
        if plan.rows:
            self._in_flight.append(plan)
        if self._in_flight and (len(self._in_flight) == self.depth or not plan.rows):
            self._commit()
        self._check()
        return None if ran else float("inf") if plan.wake_s is None else plan.wake_s

    def _commit(self) -> None:
        """The oldest step in flight has run."""
        plan = self._in_flight.popleft()
        took_s = self.model.step_s(plan.rows, self.ranks)
        prompt_tokens = sum(w.end - w.start for w in plan.rows if w.end - w.start > 1)
        self.scheduler.costs.stepped(prompt_tokens, took_s)
        self.now_s += took_s
        self.steps += 1
        for work in plan.rows:
            if work.sample:
                self._records[work.request.id].token(self.now_s)
        chosen = [Sampled(0) if work.sample else None for work in plan.rows]
        self.scheduler.commit(plan, chosen, self.now_s)
        self.scheduler.evictions()

    def _apply_arena_changes(self, plan: Plan) -> None:
        budget = self.scheduler.adapter_cache.budget
        for change in plan.arena_changes:
            moved = sum(slide.bytes for slide in change.slides)
            if budget is not None:
                moved += len(change.page_moves) * budget.page_bytes
            self.now_s += self.model.move_s(moved)
            if change.load is None:
                continue
            copy_s = self.model.copy_s(change.load.bytes, change.load.source)
            if self.scheduler.switches.overlap:
                self._begin_copy(change.load, copy_s)
            else:
                self._copied(change.load, copy_s)
                self.now_s += copy_s

    def _begin_copy(self, copy: Load | PageCopy, copy_s: float) -> None:
        """A copy engine for each direction: images and pages are copied one after another."""
        out = isinstance(copy, PageCopy) and copy.out
        end_s = self._copies_end_s[out] = max(self._copies_end_s[out], self.now_s) + copy_s
        self._copies_begun += 1
        heapq.heappush(self._copies, (end_s, self._copies_begun, copy, copy_s))

    def _bytes(self, copy: PageCopy) -> int:
        return len(copy.pages) * self.scheduler.page_copies.page_bytes

    def _copied(self, load: Load, copy_s: float) -> None:
        """As in the engine: an image read from files stays in host memory, if it fits."""
        self.scheduler.costs.copied(load.bytes, load.source, copy_s)
        adapter_cache = self.scheduler.adapter_cache
        if (
            load.bytes
            and load.digest not in adapter_cache.host
            and adapter_cache.host.fits(load.bytes)
        ):
            adapter_cache.keep_on_host(load.digest)

    def _check(self) -> None:
        if self.check:
            self.scheduler.check()


@dataclass(frozen=True, slots=True)
class Figures:
    """What the upstream tables report, in milliseconds."""

    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    e2e_mean_ms: float
    itl_max_ms: float
    tpot_p50_ms: float


def figures(records: Sequence[RequestStats]) -> Figures:
    ttft = sorted(r.ttft_s * 1e3 for r in records)
    tpot = [r.tpot_s * 1e3 for r in records if r.tokens > 1]
    return Figures(
        ttft_mean_ms=statistics.fmean(ttft),
        ttft_p50_ms=statistics.median(ttft),
        ttft_p99_ms=percentile(ttft, 0.99),
        e2e_mean_ms=statistics.fmean(r.e2e_s * 1e3 for r in records),
        itl_max_ms=max(r.gap_max_s * 1e3 for r in records),
        tpot_p50_ms=statistics.median(tpot),
    )


def median_figures(each: Sequence[Figures]) -> Figures:
    """The median of each figure over several runs."""
    return Figures(
        **{f.name: statistics.median(getattr(e, f.name) for e in each) for f in fields(Figures)}
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Interpolates linearly between the two nearest, as numpy does."""
    position = (len(ordered) - 1) * share
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
