"""Steps that were planned and have not committed, and what must stay as it is until they have.

    depth 1    plan 1   run 1 ──────> commit 1   plan 2   run 2 ──────> commit 2
    depth 2    plan 1   run 1 ─────────────────> run 2 ───────────────> run 3
                        plan 2        commit 1   plan 3       commit 2  …

A step in flight names the pages of its rows, the slots of their adapters and the bytes of those.
What it names is given up in one of two ways:

- A request that ends (by a token that nobody knew, or cancelled) lingers until the last step that
  names it commits; so does its adapter, when it was forgotten. What a row of it gives is dropped.
- A plan that takes what is named for somebody else (pages of a row that gives way, the place of an
  adapter whose rows are parked, images that slide, pages that are copied elsewhere) waits: it is
  carried out when the step in flight has committed.
"""

from collections import deque
from collections.abc import Sequence

from replica.scheduling.adapter import ArenaChange
from replica.scheduling.plan import Plan, Work
from replica.scheduling.request import Request

# Only the tokens of the launch before can be carried into a row.
_AHEAD_MAX = 1


class InFlight:
    """At most one step in flight while the next one is planned.

    lingering: ended, but named by a step in flight.
    """

    def __init__(self) -> None:
        self.plans: deque[Plan] = deque()
        self.deferred_free: list[Request] = []
        self.number = 0  # of the step that was planned last
        self.committed = 0
        self._waits_for = 0  # the plan that was made last waits for this step

    def begin(self) -> None:
        """A step is about to be planned."""
        assert len(self.plans) <= _AHEAD_MAX, "too far ahead"
        assert self._waits_for <= self.committed, "the plan before was to wait"
        self.number += 1

    def references(self, request: Request) -> bool:
        return request.step > self.committed

    def took_from(self, request: Request) -> None:
        """Its pages may be somebody else's in the plan that is being made."""
        assert request.step < self.number, "a row is being planned for it"
        self._waits_for = max(self._waits_for, request.step)

    def took(self, arena_changes: Sequence[ArenaChange]) -> None:
        """The plan that is being made evicts, slides and copies these."""
        if self.plans and any(r.slides or r.page_moves or self._uses(r) for r in arena_changes):
            self._waits_for = self.plans[-1].number

    @property
    def waits(self) -> bool:
        return self._waits_for > self.committed

    def add(self, plan: Plan) -> None:
        self.plans.append(plan)

    def narrow(self, plan: Plan, dropped: Sequence[Work]) -> None:
        """The newest step has become `plan`; it does not name what was dropped."""
        self.plans.pop()
        before = {id(work.request) for earlier in self.plans for work in earlier.rows}
        number = self.plans[-1].number if self.plans else 0
        for work in dropped:
            work.request.step = number if id(work.request) in before else 0
        if plan.rows:
            self.plans.append(plan)

    def commit(self, plan: Plan) -> None:
        assert self.plans and self.plans[0] is plan, "steps commit in the order of their plans"
        self.plans.popleft()
        self.committed = plan.number

    def released(self) -> list[Request]:
        """Ended requests that no step names any more."""
        if not self.deferred_free:
            return []
        released = [request for request in self.deferred_free if not self.references(request)]
        self.deferred_free = [request for request in self.deferred_free if self.references(request)]
        return released

    def check(self, page_tokens: int, slots: dict[str | None, int | None]) -> None:
        """slots: of each adapter, by place."""
        for plan in self.plans:
            if plan.number <= self._waits_for:
                continue  # what it names is taken, by a plan that is carried out after it
            for request, _, end, slot, _ in plan.rows:
                assert request.step >= plan.number
                assert len(request.pages) * page_tokens >= end, "pages of a step in flight"
                here = slots.get(request.adapter_key)
                assert here is not None, "an adapter of a step in flight has left"
                assert request.digest is None or here == slot
        assert all(map(self.references, self.deferred_free))

    def _uses(self, change: ArenaChange) -> bool:
        evicted = {evict.digest for evict in change.evictions}
        return any(work.request.adapter_key in evicted for plan in self.plans for work in plan.rows)
