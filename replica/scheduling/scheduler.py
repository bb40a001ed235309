"""What runs next: `step` makes a plan, `commit` takes in what the plan yielded.

The next plan may be made before this one has committed (`in_flight.py`).

    add ──> waiting ── step: admitted ──> running ── commit: last token ──> ended
              ^                           │    ^
              ├── step: no page left ─────┤    │ step: its adapter is back
              │                           v    │
              └── pages dropped ──────── parked

Decode rows go first (`decode.py`), then prompts in progress, then new requests; `prefill.py`
divides the tokens among prompts. A request that cannot run (its adapter is loading, or it finds no
pages) does not stop the scan, unless `on_miss` is "block". Base requests need no adapter: they wait
for pages and a row only.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from cluster.costs import Costs
from cluster.errors import AdapterFailed, FleetError
from cluster.values import Tier
from replica.scheduling.activation import Activations
from replica.scheduling.adapter import ArenaChange, Evict
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits, accepted, check_admissible, check_queue, no_token
from replica.scheduling.admission_order import AdmissionOrder
from replica.scheduling.decode import Decode
from replica.scheduling.drainer import Drainer
from replica.scheduling.growth import Growth
from replica.scheduling.in_flight import InFlight
from replica.scheduling.invariants import check_requests
from replica.scheduling.loads import BASE_KEY, Loads, Switches
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Plan, Work, unplan
from replica.scheduling.prefill import Prefill
from replica.scheduling.prefill_groups import hold_until
from replica.scheduling.request import (
    ENDED,
    Delta,
    Finish,
    NewRequest,
    Outputs,
    Phase,
    Request,
    Sampled,
)
from replica.scheduling.running_set import RunningSet
from replica.scheduling.saved_pages import SavedPages
from replica.scheduling.share import Share
from replica.scheduling.timeline import Event, Timelines
from replica.scheduling.turns import Sharing, Turns
from replica.scheduling.waiting import Waiting


class Scheduler:
    """Owns every request, page and adapter claim of one engine."""

    def __init__(
        self,
        limits: Limits,
        pages: Pages,
        adapter_cache: AdapterCache,
        costs: Costs | None = None,
        switches: Switches | None = None,
        sharing: Sharing | None = None,
        share: Share | None = None,
        growth: Growth | None = None,
        page_copies: PageCopies | None = None,
    ) -> None:
        self.limits = limits
        self.pages = pages
        self.adapter_cache = adapter_cache
        self.costs = costs or Costs()
        self.switches = switches or Switches()
        self.share = share or Share()
        self.activations = Activations()
        self.timelines = Timelines()
        self.growth = growth or Growth(pages.page_tokens, pages.total * pages.page_tokens)
        self.page_copies = page_copies or PageCopies(pages, None, 0, self.costs)
        self.waiting = Waiting()
        self.in_flight = InFlight()
        self.running_set = RunningSet(
            limits.batch_rows_max,
            limits.parked_pages_max,
            SavedPages(limits.page_wait_max_s if self.switches.skip else None, pages),
            pages,
            adapter_cache,
            self.waiting,
            self.timelines,
            self.in_flight,
            self.growth,
            self.page_copies,
        )
        running = self.running_set.running
        turns = Turns(
            sharing or Sharing(), adapter_cache, self.waiting, running, self.costs, self.growth
        )
        self.drainer = Drainer(turns, adapter_cache, self.costs)
        self.loads = Loads(
            self.switches,
            limits.loads_in_flight_max,
            adapter_cache,
            self.waiting,
            self.running_set,
            self.drainer,
            self.costs,
            self.timelines,
        )
        self._order = AdmissionOrder(
            self.switches,
            adapter_cache,
            self.waiting,
            self.running_set,
            self.in_flight,
            self.drainer,
            self.share,
        )
        self._decode = Decode(self.running_set, pages, self.in_flight)
        self._prefill = Prefill(limits.step_tokens_max, self.switches.skip)
        self.arrivals: Counter[Tier] = Counter()  # by the adapter's tier at arrival
        self._requests: dict[str, Request] = {}
        self._evictions: list[Evict] = []
        if not self.switches.base_pinned:
            adapter_cache.register(BASE_KEY, "", 0, pinned=False, now_s=0.0)

    def add(self, new: NewRequest, now_s: float) -> Request:
        """Accept a request. If it raises a FleetError, nothing has changed."""
        assert new.id not in self._requests
        check_admissible(new, self.limits, self.pages, self.adapter_cache)
        running = self.running_set.running.values()
        check_queue(len(self.waiting), running, self.limits, self.costs.decode_s)
        new, base_tokens = self.activations.resolved(new)
        adapter_key = new.digest
        if adapter_key is None and not self.switches.base_pinned:
            adapter_key = BASE_KEY
        request = accepted(new, adapter_key, base_tokens, self.limits, now_s)
        if adapter_key is not None:
            self.adapter_cache.claim(adapter_key, now_s)
        self._requests[new.id] = request
        self.waiting.add(request)
        self.share.enter(adapter_key)
        tier = Tier.DEVICE
        if adapter_key is not None:
            tier = self.adapter_cache.adapters[adapter_key].tier
            self.arrivals[tier] += 1
        self.timelines.note(new.id, now_s, Event.QUEUED, f"adapter {tier}")
        return request

    def cancel(self, request_id: str, now_s: float) -> bool:
        """False if it has already ended."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, Phase.CANCELLED, now_s)
        return True

    def fail(self, request: Request, error: FleetError, now_s: float) -> Delta:
        """End a request, in any phase, with an error."""
        self._end(request, Phase.FAILED, now_s)
        return Delta(request.id, error=error)

    def forget(self, digest: str) -> None:
        """Accept no new requests for it. It leaves when the accepted ones have ended."""
        self.share.forget(digest)
        self.activations.forget(digest)
        self._evictions += self.adapter_cache.forget(digest)

    def loaded(self, digest: str, now_s: float) -> None:
        self.loads.loaded(digest, now_s)
        self._evictions += self.adapter_cache.loaded(digest, now_s)

    def load_failed(self, digest: str, reason: str, now_s: float) -> None:
        self.loads.failed(digest, now_s)
        self.adapter_cache.failed(digest, reason, now_s)

    def lost(self, digest: str, reason: str, now_s: float) -> list[Delta]:
        """Without overlap: a load that the newest plan assumed done has failed.

        Of its rows, those that have tokens wait for a retry. The others fail.
        """
        error = AdapterFailed(f"the adapter did not load: {reason}", field="model")
        failed = []
        works = self.in_flight.plans[-1].rows if self.in_flight.plans else ()
        for work in works:
            request = work.request
            if request.adapter_key != digest or request.phase is not Phase.RUNNING:
                continue
            if request.output:
                unplan(work)
                self.running_set.preempt(request, now_s)
            else:
                failed.append(self.fail(request, error, now_s))
        if self.adapter_cache.usable(digest):  # else the same plan evicted it again
            self.adapter_cache.lost(digest, reason, now_s)
        return failed

    def pages_copied(self, number: int, now_s: float) -> None:
        """The page copy of this number is done."""
        request = self.page_copies.done(number)
        if request.phase is Phase.RUNNING and request.adapter_key is not None:
            # Its turn begins now that the row can be computed.
            self.adapter_cache.adapters[request.adapter_key].slice_s = now_s
        self._release()

    def evictions(self) -> list[Evict]:
        """Adapters dropped for good since the last call. Their slots must be cleared."""
        evictions, self._evictions = self._evictions, []
        return evictions

    @property
    def has_work(self) -> bool:
        """True while a request has not ended, or a step or a page copy."""
        copying = self.page_copies.in_progress
        return bool(self._requests or self.in_flight.plans or copying)

    def step(self, now_s: float) -> Plan:
        backoff = self.adapter_cache.backoff
        failing = backoff.failing(self.waiting, now_s)
        failed = [self.fail(request, error, now_s) for request, error in failing]
        closed, retry_s = backoff.paused(now_s), backoff.next_retry_s(self.waiting, now_s)
        self.in_flight.begin()
        self.drainer.tick(closed, self.waiting)
        arena_changes: list[ArenaChange] = []
        self.running_set.begin_step(self.drainer.drains, self.drainer.may_admit)
        if self.switches.overlap or self.drainer.sharing.park:
            first = self._order.blocking_adapter(closed)
            changes, ending = self.loads.plan(first, closed, now_s)
            arena_changes += changes
            closed = closed | ending
        rows, begun = self._decode.rows(now_s)
        arena_changes += self.running_set.take_changes()
        tokens_max = self.limits.step_tokens_max
        tokens = tokens_max - len(rows)
        hold_s = hold_until(
            self.loads.expected, self.adapter_cache, self.waiting, self.costs, tokens_max, now_s
        )
        if tokens > 0:
            waiting = self._order.candidates(closed, hold_s is not None)

            def admit(request: Request) -> bool:
                admitted, changes = self._admit(request, arena_changes, now_s)
                arena_changes.extend(changes)
                return admitted

            rows += self._prefill.rows(self.in_flight.number, tokens, begun, waiting, admit)
        self.in_flight.reuse_memory(arena_changes)
        plan = Plan(
            self.in_flight.number,
            tuple(arena_changes),
            tuple(rows),
            tuple(failed),
            self.page_copies.planned(),
            self.in_flight.waits,
            None if rows else min(filter(None, (hold_s, retry_s)), default=None),
        )
        if rows:
            self.in_flight.add(plan)
        return plan

    def without(self, plan: Plan, drop: Callable[[Work], bool]) -> Plan:
        """The newest plan less some of its rows. It must not have been carried out yet."""
        narrow = self.in_flight.without(plan, drop)
        self._release()
        return narrow

    def without_ended(self, plan: Plan) -> Plan:
        """The plan less the rows whose request has ended, or left the batch, since."""
        return self.without(plan, lambda work: work.request.phase is not Phase.RUNNING)

    def commit(self, plan: Plan, chosen: Sequence[Sampled | None], now_s: float) -> Outputs:
        """chosen: one for each row of the plan; None if the row did not sample."""
        outputs = Outputs()
        if not plan.rows:
            return outputs
        self.in_flight.commit(plan)
        deltas, tokens = outputs.deltas, outputs.tokens
        page_tokens, running, share = self.pages.page_tokens, Phase.RUNNING, self.share.on
        computed = recomputed = 0
        for (request, start, end, _, sample), choice in zip(plan.rows, chosen, strict=True):
            computed += end - start
            if end <= request.quiet_until:
                assert choice is not None
                token, logprobs, finite, allowed = choice
                if logprobs is None and finite and allowed and token not in request.stops:
                    if share:
                        self.share.served(request.adapter_key, end - start, sample)
                    request.output.append(token)
                    tokens.append((request.id, token))
                    continue
            if start < request.lost:
                recomputed += min(end, request.lost) - start
            if request.phase is not running:
                if request.phase in ENDED:
                    continue  # it ended after this row was planned
                self.waiting.touch(request)
            if end // page_tokens > request.published and request.pages:
                self.running_set.publish(request, end)
            if share:
                self.share.served(request.adapter_key, end - start, sample)
            if not sample:
                assert choice is None
                continue
            assert choice is not None
            token, logprobs, finite, allowed = choice
            if not (finite and allowed):
                deltas.append(self.fail(request, no_token(finite), now_s))
                continue
            cached, queued_s, finish, output = 0, 0.0, None, request.output
            if not output:
                assert request.admitted_s is not None
                cached, queued_s = request.cached, request.admitted_s - request.arrived_s
                request.first_s = now_s
                self.timelines.note(request.id, now_s, Event.FIRST_TOKEN)
            output.append(token)
            if token in request.stops and len(output) > request.sampling.min_tokens:
                finish = Finish.STOP
            elif end + 1 >= request.tokens_max:
                finish = Finish.LENGTH
            reported = () if logprobs is None else (logprobs,)
            deltas.append(Delta(request.id, (token,), reported, finish, None, cached, queued_s))
            if finish is not None:
                self.growth.ended(len(output))
                self._end(request, Phase.FINISHED, now_s)
            elif request.phase is running:
                page_end = (request.published + 1) * page_tokens
                request.quiet_until = min(page_end - 1, request.tokens_max - 2)
        self.growth.computed(computed - recomputed, recomputed)
        self._release()
        return outputs

    def check(self) -> None:
        """Check the invariants. Raises AssertionError."""
        check_requests(
            self._requests,
            self.waiting,
            self.running_set,
            self.in_flight,
            self.pages,
            self.page_copies,
            self.adapter_cache,
        )
        self.adapter_cache.check()
        self.running_set.check()
        self.growth.check(self.limits.batch_rows_max)
        self.loads.order.check()
        slots: dict[str | None, int | None] = {None: 0}
        slots |= {a.digest: a.slot for a in self.adapter_cache.adapters.values()}
        self.in_flight.check(self.pages.page_tokens, slots)

    def _admit(
        self, request: Request, before: Sequence[ArenaChange], now_s: float
    ) -> tuple[bool, list[ArenaChange]]:
        """Give it a row of the batch. Also returns the changes that make room for it.

        False if it waits, for these or for its pages to come back from host memory.
        before: the changes of this step so far.
        """
        alone = self.running_set.nothing_runs
        brought = self.loads.bring(request, now_s)
        changes = [] if brought is None else [brought]
        placed = self.running_set.placed(request)
        if placed and request.host_pages and not self.switches.overlap:
            # Its pages return after the load, which may fail.
            key = request.adapter_key
            loads = [change.load for change in (*before, *changes)]
            placed = all(load is None or load.digest != key for load in loads)
        admitted = placed and self.running_set.admit(request, now_s, alone)
        changes += self.running_set.take_changes()
        return admitted and request.copying is None, changes

    def _end(self, request: Request, phase: Phase, now_s: float) -> None:
        adapter_key = request.adapter_key
        self.running_set.end(request, phase, now_s)
        self.waiting.forget(request)
        del self._requests[request.id]
        self.share.leave(adapter_key)
        self.timelines.note(request.id, now_s, Event.DONE, phase.value)
        if self.in_flight.references(request):
            self.in_flight.deferred_free.append(request)
            if adapter_key is not None:
                self.adapter_cache.hold(adapter_key)
        else:
            self.running_set.free(request)
        if adapter_key is not None:
            self._evictions += self.adapter_cache.unclaim(adapter_key)

    def _release(self) -> None:
        """Free what a step referenced until it committed."""
        for request in self.in_flight.released():
            self.running_set.free(request)
            if request.adapter_key is not None:
                self._evictions += self.adapter_cache.let_go(request.adapter_key)
