"""Steps that were planned but have not committed, and what must not change until they have.

    depth 1    plan 1   run 1 ──────> commit 1   plan 2   run 2 ──────> commit 2
    depth 2    plan 1   run 1 ─────────────────> run 2 ───────────────> run 3
                        plan 2        commit 1   plan 3       commit 2  …

A step in flight references the pages of its rows, and the slots and bytes of their adapters. These
are given up in one of two ways:

- A request that ends (by a token unknown at planning, or cancelled) keeps its pages until the last
  step that references it commits. So does its adapter, if it was forgotten. What its row yields is
  dropped.
- A plan that gives referenced memory to others waits: it is carried out when the step in flight has
  committed. Such a plan preempts a row, parks the rows of an adapter and evicts it, slides images,
  or copies pages elsewhere.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from replica.scheduling.adapter import ArenaChange
from replica.scheduling.plan import Plan, Work, unplan
from replica.scheduling.request import Phase, Request

# A row can take its input token only from the launch right before it.
_AHEAD_MAX = 1


class InFlight:
    """At most one step is in flight while the next one is planned.

    deferred_free: ended requests that a step in flight or a page copy still references.
    number: of the step planned last.
    """

    def __init__(self) -> None:
        self.plans: deque[Plan] = deque()
        self.deferred_free: list[Request] = []
        self.number = 0
        self.committed = 0
        self._waits_for = 0  # the newest plan waits until this step has committed

    def begin(self) -> None:
        """A step is about to be planned."""
        assert len(self.plans) <= _AHEAD_MAX, "planned too far ahead"
        assert self._waits_for <= self.committed, "the previous plan still waits"
        self.number += 1

    def references(self, request: Request) -> bool:
        """True if a step in flight uses its pages, or a copy does."""
        return request.step > self.committed or request.copying is not None

    def reuse_pages_of(self, request: Request) -> None:
        """The plan in progress may give the request's pages to another."""
        assert request.step < self.number, "it has a row in the plan in progress"
        self._waits_for = max(self._waits_for, request.step)

    def reuse_memory(self, arena_changes: Sequence[ArenaChange]) -> None:
        """The plan in progress makes these changes."""
        if self.plans and any(c.slides or c.page_moves or self._uses(c) for c in arena_changes):
            self._waits_for = self.plans[-1].number

    @property
    def waits(self) -> bool:
        return self._waits_for > self.committed

    def add(self, plan: Plan) -> None:
        self.plans.append(plan)

    def without(self, plan: Plan, drop: Callable[[Work], bool]) -> Plan:
        """The newest plan less some of its rows. It must not have been carried out yet."""
        dropped = [work for work in plan.rows if drop(work)]
        if not dropped:
            return plan
        plan = replace(plan, rows=tuple(work for work in plan.rows if not drop(work)))
        for work in dropped:
            if work.request.phase is Phase.RUNNING:
                unplan(work)
        self.plans.pop()
        before = {id(work.request) for earlier in self.plans for work in earlier.rows}
        number = self.plans[-1].number if self.plans else 0
        for work in dropped:
            work.request.step = number if id(work.request) in before else 0
        if plan.rows:
            self.plans.append(plan)
        return plan

    def commit(self, plan: Plan) -> None:
        assert self.plans and self.plans[0] is plan, "steps commit in the order of their plans"
        self.plans.popleft()
        self.committed = plan.number

    def released(self) -> list[Request]:
        """Ended requests that no step and no copy references any more."""
        if not self.deferred_free:
            return []
        released = [request for request in self.deferred_free if not self.references(request)]
        self.deferred_free = [request for request in self.deferred_free if self.references(request)]
        return released

    def check(self, page_tokens: int, slots: dict[str | None, int | None]) -> None:
        """slots: of each adapter, by `adapter_key`."""
        for plan in self.plans:
            if plan.number <= self._waits_for:
                continue  # the newest plan reuses its memory, and waits for it
            for request, start, end, slot, _ in plan.rows:
                assert request.step >= plan.number
                assert request.copying is None or request.ended, "a row whose pages are copied"
                assert len(request.pages) * page_tokens >= end, "a step in flight lost its pages"
                known = len(request.prompt) + len(request.output)
                assert not request.stepwise or start < known, "planned before its token is known"
                here = slots.get(request.adapter_key)
                assert here is not None, "an adapter of a step in flight left"
                assert request.digest is None or here == slot
        assert all(map(self.references, self.deferred_free))

    def _uses(self, change: ArenaChange) -> bool:
        evicted = {evict.digest for evict in change.evictions}
        return any(work.request.adapter_key in evicted for plan in self.plans for work in plan.rows)
