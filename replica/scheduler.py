"""What runs next: one `step` makes a plan, one `commit` takes in what the plan gave.

    add ──> waiting ── step: admitted ──> running ── commit: last token ──> ended
              ^                           │    ^
              ├── step: no page left ─────┤    │ step: its adapter is back
              │                           v    │
              └── pages dropped ──────── parked

Decode rows come first, then the prompts that have begun, then new ones. A request that cannot run
(its adapter is on its way, its prompt finds no pages) never stops the scan, unless `on_miss` says
so. Base requests need no adapter: they wait for pages and batch space alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.costs import Costs
from cluster.errors import AdapterFailed, BadRequest, FleetError, ModelNotFound, QueueFull
from cluster.values import Tier
from replica import prefetch
from replica.drainer import Drainer, Sharing
from replica.pages import Pages
from replica.request import Delta, Finish, NewRequest, Phase, Request, TokenLogprobs
from replica.residency import Evict, Residency, Room
from replica.share import Share
from replica.story import Event, Stories
from replica.waiting import Waiting

# The place that the base model takes when `base_slot` is shared: no bytes, but a slot.
BASE_PLACE = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step, and the queue, may hold.

    queue_max: requests beyond a full batch. context: the longest prompt + output, in tokens.
    parked_pages_max: pages that parked rows may hold. page_wait_max_s: how long a request may be
    passed over for want of pages before the pages that come free are saved for it.
    """

    batch_rows_max: int
    step_tokens_max: int
    queue_max: int
    loads_in_flight_max: int
    context: int
    eos_tokens: frozenset[int] = frozenset()
    parked_pages_max: int | None = None
    page_wait_max_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Switches:
    """How it decides; the defaults are the best ones, the others what servers did before.

    base_pinned: else the base model competes for a slot. skip: else the first request that cannot
    run stops the scan. overlap: else a load stops the batch. prefetch_depth: adapters that may be
    loaded beyond those there is batch space for.
    """

    base_pinned: bool = True
    skip: bool = True
    overlap: bool = True
    prefetch_depth: int = 8


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens [start, end) of one request; `sample`: and choose the token that follows."""

    request: Request
    start: int
    end: int
    slot: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """To be carried out in this order: rooms (evict, slide, load), then the rows as one batch.

    wake_s: when there are no rows, the time at which another step may find some.
    """

    rooms: tuple[Room, ...]
    rows: tuple[Work, ...]
    failed: tuple[Delta, ...]
    wake_s: float | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the batch gave a row that sampled."""

    token: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """Owns every request, page and adapter claim of one engine."""

    def __init__(
        self,
        limits: Limits,
        pages: Pages,
        residency: Residency,
        costs: Costs | None = None,
        switches: Switches | None = None,
        sharing: Sharing | None = None,
        share: Share | None = None,
    ) -> None:
        self.limits = limits
        self.pages = pages
        self.residency = residency
        self.costs = costs or Costs()
        self.switches = switches or Switches()
        self.drainer = Drainer(sharing or Sharing(), residency, self.costs)
        self.share = share or Share()
        self.stories = Stories()
        self.waiting = Waiting()
        self.running: dict[str, Request] = {}
        self.parked: dict[str, Request] = {}
        self._requests: dict[str, Request] = {}
        self._evictions: list[Evict] = []
        self._eta_s: dict[str, float] = {}
        self._passed_over: tuple[Request, float] | None = None
        if not self.switches.base_pinned:
            residency.register(BASE_PLACE, "", 0, pinned=False, now_s=0.0)

    # ---- what happens to requests and loads

    def add(self, new: NewRequest, now_s: float) -> Request:
        """Accept a request, or raise a FleetError and take nothing in."""
        self._admissible(new)
        place = new.digest
        if place is None and not self.switches.base_pinned:
            place = BASE_PLACE
        request = Request(new.id, new.prompt, new.sampling, new.digest, place, new.priority, now_s)
        if place is not None:
            self.residency.claim(place, now_s)
        self._requests[new.id] = request
        self.waiting.add(request)
        self.share.enter(place)
        tier = Tier.DEVICE if place is None else self.residency.adapters[place].tier
        self.stories.note(new.id, now_s, Event.QUEUED, f"adapter {tier}")
        return request

    def cancel(self, request_id: str, now_s: float) -> bool:
        """False when it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, Phase.CANCELLED, now_s)
        return True

    def forget(self, digest: str) -> None:
        self._evictions += self.residency.forget(digest)

    def loaded(self, digest: str, now_s: float) -> None:
        self._eta_s.pop(digest, None)
        for request in self.waiting.group(digest):
            self.stories.note(request.id, now_s, Event.LOAD_DONE)
        self._evictions += self.residency.loaded(digest, now_s)

    def load_failed(self, digest: str, reason: str, now_s: float) -> None:
        self._eta_s.pop(digest, None)
        self.residency.failed(digest, reason, now_s)

    def lost(self, digest: str, reason: str, now_s: float) -> list[Delta]:
        """Without overlap: a load planned as done has failed, and so do the rows it was for."""
        error = AdapterFailed(f"the adapter did not load: {reason}", field="model")
        rows = [r for r in self.running.values() if r.place == digest]
        failed = [self._fail(request, error, now_s) for request in rows]
        if digest in self.residency.adapters:
            self.residency.lost(digest, reason, now_s)
        return failed

    def evictions(self) -> list[Evict]:
        """Adapters that left for good since the last call; their slots are to be cleared."""
        evictions, self._evictions = self._evictions, []
        return evictions

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    # ---- the step

    def step(self, now_s: float) -> Plan:
        failed = self._fail_quarantined(now_s)
        self.drainer.tick()
        if self._passed_over is not None and not self._placed(self._passed_over[0]):
            self._passed_over = None  # its adapter left meanwhile: pages would not help it
        closed: set[str] = set()
        parks = self.drainer.sharing.park
        rooms = self._loads(now_s, closed) if self.switches.overlap or parks else []
        rows = self._decodes(now_s)
        budget = self.limits.step_tokens_max - len(rows)
        for request in [r for r in self.running.values() if not self._decoding(r)]:
            if budget <= 0:
                break
            rows.append(self._chunk(request, budget))
            budget -= rows[-1].end - rows[-1].start
        hold_s = self._hold(now_s)
        for request in self._scan():
            if budget <= 0 or len(self.running) >= self.limits.batch_rows_max:
                break
            if request.place in closed or not self.drainer.may_admit(request):
                continue
            if hold_s is not None and self._fresh(request):
                continue
            if not self._bring(request, rooms, now_s) or not self._admit(
                request, now_s, alone=not rows
            ):
                if self.switches.skip:
                    continue
                break
            rows.append(self._chunk(request, budget))
            budget -= rows[-1].end - rows[-1].start
        wake_s = None if rows else hold_s
        return Plan(tuple(rooms), tuple(rows), tuple(failed), wake_s)

    def commit(self, plan: Plan, chosen: Sequence[Chosen | None], now_s: float) -> list[Delta]:
        """`chosen`: one for each row of the plan, None where it did not sample."""
        deltas = []
        for work, choice in zip(plan.rows, chosen, strict=True):
            request = work.request
            assert request.phase is Phase.RUNNING and request.computed == work.start
            assert work.sample == (choice is not None)
            request.computed = work.end
            self.share.served(request.place, work.end - work.start, choice is not None)
            if choice is None:
                continue
            if not request.output:
                self.stories.note(request.id, now_s, Event.FIRST_TOKEN)
            request.output.append(choice.token)
            finish = self._finish(request, choice.token)
            logprobs = () if choice.logprobs is None else (choice.logprobs,)
            deltas.append(Delta(request.id, (choice.token,), logprobs, finish))
            if finish is not None:
                self._end(request, Phase.FINISHED, now_s)
        return deltas

    def check(self) -> None:
        """The invariants; raises AssertionError."""
        waiting = {request.id for request in self.waiting}
        assert waiting.isdisjoint(self.running)
        assert set(self.parked) <= waiting
        assert waiting | set(self.running) == set(self._requests), "a request was lost"
        assert len(waiting) == len(self.waiting)
        for request in self._requests.values():
            phase = Phase.WAITING
            if request.id in self.running:
                phase = Phase.RUNNING
            elif request.id in self.parked:
                phase = Phase.PARKED
            assert request.phase is phase
            assert bool(request.pages) == (phase is not Phase.WAITING)
            assert request.computed <= len(request.pages) * self.pages.page_tokens
        self.pages.check(r.pages for r in self._requests.values())
        self.residency.check()
        for digest, adapter in self.residency.adapters.items():
            own = [r for r in self._requests.values() if r.place == digest]
            assert adapter.claims == len(own)
            assert adapter.users == sum(r.id in self.running for r in own)
            starves = adapter.wanted and adapter.tier is not Tier.DEVICE
            assert not starves or adapter.starved_s is not None
        assert len(self.running) <= self.limits.batch_rows_max
        most = self.limits.parked_pages_max
        assert most is None or self._parked_pages() <= most

    # ---- who comes in

    def _admissible(self, new: NewRequest) -> None:
        assert new.id not in self._requests and new.prompt and new.sampling.max_tokens > 0
        if len(new.prompt) >= self.limits.context:
            raise BadRequest(
                f"prompt: {len(new.prompt)} tokens leave no room for an answer in a context of "
                f"{self.limits.context}",
                field="prompt",
            )
        most = min(len(new.prompt) + new.sampling.max_tokens, self.limits.context)
        if self.pages.needed(most) > self.pages.capacity:
            raise BadRequest(
                f"prompt + max_tokens: {most} tokens take {self.pages.needed(most)} KV pages; "
                f"this engine has {self.pages.capacity}",
                field="max_tokens",
            )
        if new.digest is not None:
            adapter = self.residency.adapters.get(new.digest)
            if adapter is None or adapter.leaving:
                raise ModelNotFound(f"adapter {new.digest[:12]} is not registered here")
        if len(self._requests) >= self.limits.queue_max + self.limits.batch_rows_max:
            raise QueueFull(
                f"{len(self.waiting)} requests wait and {len(self.running)} run already, "
                "the most this engine takes",
                retry_after_s=self._expected_wait_s(),
            )

    def _expected_wait_s(self) -> float:
        """Until a row of the batch comes free: the shortest of what is left, at today's pace."""
        left = min((r.remaining for r in self.running.values()), default=1)
        return max(1.0, left * self.costs.decode_s)

    # ---- adapters

    def _loads(self, now_s: float, closed: set[str]) -> list[Room]:
        """Begin the loads there is room for; those who find none take a place, or wait."""
        rooms: list[Room] = []
        space = self.limits.batch_rows_max - len(self.running) + self.switches.prefetch_depth
        ahead = prefetch.ahead(self.residency)
        pinned = self.residency.pinned_elsewhere(now_s)
        for digest in [*pinned, *self._starving()]:
            if self.residency.loading >= self.limits.loads_in_flight_max:
                break
            keep = self.drainer.kept(digest)
            if digest not in pinned and self.switches.skip:
                sooner = prefetch.needed_sooner(digest, self.waiting, self.residency)
                keep |= sooner - self.drainer.drained_for(digest)
            victims = self._idle_victims(digest, keep)
            if victims is None and digest not in pinned:
                victims = self._take_place(digest, keep, now_s, closed)
            elif ahead >= space and self.switches.skip:
                continue
            if victims is not None:
                rooms.append(self._begin(digest, victims, now_s))
                ahead += 1
        return rooms

    def _starving(self) -> list[str]:
        """Adapters to bring, in this order; where the first request blocks, only its own."""
        head_start_s = self.drainer.sharing.head_start_s
        starving = prefetch.service_order(self.waiting, self.residency, head_start_s)
        if self.switches.skip:
            return starving
        head = next((r for r in self._scan() if self.drainer.may_admit(r)), None)
        return [digest for digest in starving if head is not None and head.place == digest]

    def _idle_victims(self, digest: str, keep: set[str]) -> list[str] | None:
        return self.residency.victims_for(digest, keep, spare_fresh=self.switches.skip)

    def _begin(self, digest: str, victims: Sequence[str], now_s: float) -> Room:
        room = self.residency.make_room(digest, victims, now_s)
        after_s = max([now_s, *self._eta_s.values()])
        self._eta_s[digest] = after_s + self.costs.copy_s(room.load.bytes)
        for request in self.waiting.group(digest):
            self.stories.note(request.id, now_s, Event.LOAD_STARTED)
        if not self.switches.overlap:
            self.loaded(digest, now_s)  # whoever carries out the plan waits for the copy
        return room

    def _take_place(
        self, digest: str, keep: set[str], now_s: float, closed: set[str]
    ) -> list[str] | None:
        """Another's place for a starving adapter: now (its rows are parked), soon, or not yet."""
        head = self.waiting.head(digest)
        if not head.pages and self.pages.free < self.pages.needed(head.tokens):
            return None  # it starves for pages: a place would not help it
        way = self.drainer.park(digest, keep, self.running.values(), now_s)
        if way is None:
            self._drain(digest, now_s)
            return None
        closed |= way.closed
        rows = [r for r in self.running.values() if r.place in way.victims]
        held = self._parked_pages() + sum(len(r.pages) for r in rows)
        if self.limits.parked_pages_max is not None and held > self.limits.parked_pages_max:
            return None  # rows that lost their pages each time would get nowhere
        for request in rows:
            self._park(request, now_s)
        return list(way.victims) or None

    def _bring(self, request: Request, rooms: list[Room], now_s: float) -> bool:
        """Whether its adapter is there. Without overlap it is loaded now, and the batch waits."""
        if self._placed(request):
            return True
        assert request.place is not None
        if self.switches.overlap:
            return False
        victims = self._idle_victims(request.place, self.drainer.kept(request.place))
        if victims is None:
            self._drain(request.place, now_s)
            return False
        rooms.append(self._begin(request.place, victims, now_s))
        return True

    def _drain(self, digest: str, now_s: float) -> None:
        """Where the first request blocks the rest, all adapters in use drain by themselves."""
        if self.switches.skip:
            self.drainer.drain(digest, self.running.values(), self.waiting, now_s)

    def _hold(self, now_s: float) -> float | None:
        """Until when prompts of adapters that just came wait for those about to come.

        One prefill of a group costs little more than that of its first member: when the others are
        there within half its time, waiting wins. None: no need to wait.
        """
        if not self._eta_s or not self.switches.overlap:
            return None
        fresh = [
            a
            for a in self.residency.adapters.values()
            if a.fresh and a.wanted and a.tier is Tier.DEVICE
        ]
        tokens = sum(r.tokens - r.computed for a in fresh for r in self.waiting.group(a.digest))
        prefill_s = self.costs.prefill_s(min(tokens, self.limits.step_tokens_max))
        if not fresh or now_s - min(a.since_s for a in fresh) >= prefill_s:
            return None
        soon = [eta for eta in self._eta_s.values() if now_s < eta <= now_s + prefill_s / 2]
        return max(soon, default=None)

    def _placed(self, request: Request) -> bool:
        return request.place is None or self.residency.usable(request.place)

    def _fresh(self, request: Request) -> bool:
        return request.place is not None and self.residency.adapters[request.place].fresh

    def _fail_quarantined(self, now_s: float) -> list[Delta]:
        """Requests whose adapter could not be loaded fail; after the pause the next one retries."""
        failed = []
        for digest in self.waiting.places():
            adapter = self.residency.adapters[digest]
            if adapter.tier is not Tier.FAILED or now_s >= adapter.retry_s:
                continue
            left_s = adapter.retry_s - now_s
            message = f"the adapter did not load: {adapter.reason}; retried in {left_s:.1f} s"
            for request in self.waiting.group(digest):
                error = AdapterFailed(message, field="model", retry_after_s=left_s)
                failed.append(self._fail(request, error, now_s))
        return failed

    # ---- rows

    def _decodes(self, now_s: float) -> list[Work]:
        """One token for each request whose prompt is computed, oldest first."""
        rows = []
        for request in list(self.running.values()):
            if request.phase is not Phase.RUNNING or not self._decoding(request):
                continue
            if self._grow(request, now_s):
                rows.append(self._chunk(request, 1))
        return rows

    def _grow(self, request: Request, now_s: float) -> bool:
        """A page for the next token; parked rows give theirs up, then newer ones, at last this."""
        while self.pages.needed(request.tokens) > len(request.pages):
            page = self._take_pages(1, now_s, drop=True)
            if page is not None:
                request.pages += page
                continue
            newest = next(reversed(self.running.values()))
            self._preempt(newest, now_s)
            if newest is request:
                return False
        return True

    def _decoding(self, request: Request) -> bool:
        return request.computed == request.tokens - 1 and bool(request.output)

    def _chunk(self, request: Request, budget: int) -> Work:
        end = min(request.tokens, request.computed + budget)
        slot = self.residency.slot(request.digest)
        return Work(request, request.computed, end, slot, sample=end == request.tokens)

    def _scan(self) -> Iterable[Request]:
        everyone = not self.switches.overlap or not self.switches.skip
        share = self.share.of if self.switches.skip else _nobody
        return self.waiting.in_order(lambda place: everyone or self.residency.usable(place), share)

    def _admit(self, request: Request, now_s: float, alone: bool) -> bool:
        """Onto the batch. alone: nothing else runs in this step, so parked pages may be dropped."""
        count = self.pages.needed(request.tokens) - len(request.pages)
        waited_long = self._saved_for(request, now_s)
        if count > 0:
            saved = self._saved(now_s)
            if saved and not waited_long and self.pages.free - count < saved:
                return False
            pages = self._take_pages(count, now_s, drop=alone or waited_long, spare=request)
            if pages is None:
                if self._passed_over is None and self.switches.skip:
                    self._passed_over = (request, now_s)
                return False
            request.pages += pages
        if self._passed_over is not None and self._passed_over[0] is request:
            self._passed_over = None
        resumed = self.parked.pop(request.id, None) is not None
        if request.place is not None:
            self.residency.acquire(request.place, now_s)
        self.waiting.remove(request)
        request.become(Phase.RUNNING)
        self.running[request.id] = request
        self.stories.note(request.id, now_s, Event.RESUMED if resumed else Event.RUNNING)
        return True

    # ---- pages

    def _take_pages(
        self, count: int, now_s: float, drop: bool, spare: Request | None = None
    ) -> list[int] | None:
        """drop: parked rows may lose theirs, the newest first, but never `spare`."""
        while (pages := self.pages.take(count)) is None:
            newest = next((r for r in reversed(self.parked.values()) if r is not spare), None)
            if newest is None or not drop:
                return None
            self._drop_pages(newest, now_s)
        return pages

    def _saved_for(self, request: Request, now_s: float) -> bool:
        """Whether it was passed over for so long that others must leave it pages."""
        return (
            self._passed_over is not None
            and self._passed_over[0] is request
            and now_s - self._passed_over[1] > self.limits.page_wait_max_s
        )

    def _saved(self, now_s: float) -> int:
        """Pages that are being saved for a request that was passed over for too long."""
        if self._passed_over is None or not self._saved_for(self._passed_over[0], now_s):
            return 0
        request = self._passed_over[0]
        return self.pages.needed(request.tokens) - len(request.pages)

    def _parked_pages(self) -> int:
        return sum(len(request.pages) for request in self.parked.values())

    # ---- who leaves

    def _park(self, request: Request, now_s: float) -> None:
        """Off the batch with its pages, so that its adapter can leave."""
        assert request.place is not None
        del self.running[request.id]
        self.residency.release(request.place, now_s)
        request.become(Phase.PARKED)
        self.parked[request.id] = request
        self.waiting.add(request)
        self.stories.note(request.id, now_s, Event.PARKED)

    def _drop_pages(self, request: Request, now_s: float) -> None:
        """A parked request computes its tokens again when its turn comes."""
        del self.parked[request.id]
        self._lose_pages(request)
        request.become(Phase.WAITING)
        self.stories.note(request.id, now_s, Event.PREEMPTED, "pages dropped while parked")

    def _preempt(self, request: Request, now_s: float) -> None:
        self._stop(request, now_s)
        self._lose_pages(request)
        request.become(Phase.WAITING)
        self.waiting.add(request)
        self.stories.note(request.id, now_s, Event.PREEMPTED)

    def _lose_pages(self, request: Request) -> None:
        self.pages.give_back(request.pages)
        request.pages = []
        request.computed = 0
        request.preemptions += 1

    def _stop(self, request: Request, now_s: float) -> None:
        del self.running[request.id]
        if request.place is not None:
            self.residency.release(request.place, now_s)

    def _finish(self, request: Request, token: int) -> Finish | None:
        sampling = request.sampling
        if len(request.output) > sampling.min_tokens and (
            token in sampling.stop_tokens
            or (token in self.limits.eos_tokens and not sampling.ignore_eos)
        ):
            return Finish.STOP
        if request.remaining <= 0 or request.tokens >= self.limits.context:
            return Finish.LENGTH
        return None

    def _fail(self, request: Request, error: FleetError, now_s: float) -> Delta:
        self._end(request, Phase.FAILED, now_s)
        return Delta(request.id, error=error)

    def _end(self, request: Request, phase: Phase, now_s: float) -> None:
        if request.phase is Phase.RUNNING:
            self._stop(request, now_s)
        else:
            self.waiting.remove(request)
            self.parked.pop(request.id, None)
        if self._passed_over is not None and self._passed_over[0] is request:
            self._passed_over = None
        self.pages.give_back(request.pages)
        request.pages = []
        request.become(phase)
        self.waiting.forget(request)
        del self._requests[request.id]
        self.share.leave(request.place)
        self.stories.note(request.id, now_s, Event.DONE, phase.value)
        if request.place is not None:
            self._evictions += self.residency.unclaim(request.place)


def _nobody(_: str | None) -> float:
    return 0.0
