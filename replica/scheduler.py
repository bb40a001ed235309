"""What runs next: one `step` makes a plan, one `commit` takes in what the plan gave.

    add ──> waiting ── step: admitted ──> running ── commit: last token ──> ended
              ^                              │
              └──── step: no page left ──────┘   (newest first; its tokens are computed again)

Decode rows come first, then the prompts that have begun, then new ones in order of arrival. A
request that cannot run (its adapter is on its way, or its prompt finds no pages) never stops the
scan. Base requests need no adapter: they wait for pages and batch space alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import AdapterFailed, BadRequest, FleetError, ModelNotFound, QueueFull
from cluster.values import Tier
from replica.pages import Pages
from replica.request import Delta, Finish, NewRequest, Phase, Request, TokenLogprobs
from replica.residency import Evict, Residency, Room
from replica.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step, and the queue, may hold.

    queue_max: requests beyond a full batch. context: the longest prompt + output, in tokens.
    """

    batch_rows_max: int
    step_tokens_max: int
    queue_max: int
    loads_in_flight_max: int
    context: int
    eos_tokens: frozenset[int] = frozenset()


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
    """To be carried out in this order: rooms (evict, slide, load), then the rows as one batch."""

    rooms: tuple[Room, ...]
    rows: tuple[Work, ...]
    failed: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the batch gave a row that sampled."""

    token: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """Owns every request, page and adapter claim of one engine."""

    def __init__(self, limits: Limits, pages: Pages, residency: Residency) -> None:
        self.limits = limits
        self.pages = pages
        self.residency = residency
        self.waiting = Waiting()
        self.running: dict[str, Request] = {}
        self._requests: dict[str, Request] = {}
        self._evictions: list[Evict] = []

    def add(self, new: NewRequest, now_s: float) -> Request:
        """Accept a request, or raise a FleetError and take nothing in."""
        self._admissible(new)
        request = Request(new.id, new.prompt, new.sampling, new.digest, now_s)
        if new.digest is not None:
            self.residency.claim(new.digest)
        self._requests[new.id] = request
        self.waiting.add(request)
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
        self._evictions += self.residency.loaded(digest, now_s)

    def evictions(self) -> list[Evict]:
        """Adapters that left for good since the last call; their slots are to be cleared."""
        evictions, self._evictions = self._evictions, []
        return evictions

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self, now_s: float) -> Plan:
        failed = self._fail_quarantined(now_s)
        rooms = self._loads(now_s)
        rows = self._decodes(now_s)
        budget = self.limits.step_tokens_max - len(rows)
        for request in [r for r in self.running.values() if not self._decoding(r)]:
            if budget <= 0:
                break
            rows.append(self._chunk(request, budget))
            budget -= rows[-1].end - rows[-1].start
        for request in self.waiting.runnable(self.residency.usable):
            if budget <= 0 or len(self.running) >= self.limits.batch_rows_max:
                break
            if self._admit(request, now_s):
                rows.append(self._chunk(request, budget))
                budget -= rows[-1].end - rows[-1].start
        return Plan(tuple(rooms), tuple(rows), tuple(failed))

    def commit(self, plan: Plan, chosen: Sequence[Chosen | None], now_s: float) -> list[Delta]:
        """`chosen`: one for each row of the plan, None where it did not sample."""
        deltas = []
        for work, choice in zip(plan.rows, chosen, strict=True):
            request = work.request
            assert request.phase is Phase.RUNNING and request.computed == work.start
            assert work.sample == (choice is not None)
            request.computed = work.end
            if choice is None:
                continue
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
        assert waiting | set(self.running) == set(self._requests), "a request was lost"
        assert len(waiting) == len(self.waiting)
        for request in self._requests.values():
            runs = request.id in self.running
            assert request.phase is (Phase.RUNNING if runs else Phase.WAITING)
            assert runs or not request.pages
            assert request.computed <= len(request.pages) * self.pages.page_tokens
        self.pages.check(r.pages for r in self._requests.values())
        self.residency.check()
        for digest, adapter in self.residency.adapters.items():
            own = [r for r in self._requests.values() if r.digest == digest]
            assert adapter.claims == len(own)
            assert adapter.users == sum(r.id in self.running for r in own)
        assert len(self.running) <= self.limits.batch_rows_max

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
                retry_after_s=1.0,
            )

    def _loads(self, now_s: float) -> list[Room]:
        rooms: list[Room] = []
        for digest in [*self.waiting.digests(), *self.residency.pinned_elsewhere(now_s)]:
            if self.residency.loading >= self.limits.loads_in_flight_max:
                break
            if self.residency.adapters[digest].tier in (Tier.DISK, Tier.FAILED):
                room = self.residency.make_room(digest, now_s)
                if room is not None:
                    rooms.append(room)
        return rooms

    def _fail_quarantined(self, now_s: float) -> list[Delta]:
        """Requests whose adapter could not be loaded fail; after the pause the next one retries."""
        failed = []
        for digest in self.waiting.digests():
            adapter = self.residency.adapters[digest]
            if adapter.tier is not Tier.FAILED or now_s >= adapter.retry_s:
                continue
            left_s = adapter.retry_s - now_s
            message = (
                f"the adapter could not be loaded: {adapter.reason}; retried in {left_s:.1f} s"
            )
            for request in self.waiting.group(digest):
                error = AdapterFailed(message, field="model", retry_after_s=left_s)
                failed.append(self._fail(request, error, now_s))
        return failed

    def _decodes(self, now_s: float) -> list[Work]:
        """One token for each request whose prompt is computed, oldest first."""
        rows = []
        for request in list(self.running.values()):
            if request.phase is not Phase.RUNNING or not self._decoding(request):
                continue
            if self._grow(request, now_s):
                slot = self.residency.slot(request.digest)
                rows.append(Work(request, request.computed, request.tokens, slot, sample=True))
        return rows

    def _grow(self, request: Request, now_s: float) -> bool:
        """A page for the next token; newer requests give theirs up, at last this one its own."""
        while self.pages.needed(request.tokens) > len(request.pages):
            page = self.pages.take(1)
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

    def _admit(self, request: Request, now_s: float) -> bool:
        pages = self.pages.take(self.pages.needed(request.tokens))
        if pages is None:
            return False
        request.pages = pages
        if request.digest is not None:
            self.residency.acquire(request.digest, now_s)
        self.waiting.remove(request)
        request.become(Phase.RUNNING)
        self.running[request.id] = request
        return True

    def _preempt(self, request: Request, now_s: float) -> None:
        self._stop(request, now_s)
        request.become(Phase.WAITING)
        request.computed = 0
        request.preemptions += 1
        self.waiting.add(request)

    def _stop(self, request: Request, now_s: float) -> None:
        """Off the batch; pages and adapter are free for others."""
        del self.running[request.id]
        self.pages.give_back(request.pages)
        request.pages = []
        if request.digest is not None:
            self.residency.release(request.digest, now_s)

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
        request.become(phase)
        self.waiting.forget(request)
        del self._requests[request.id]
        if request.digest is not None:
            self._evictions += self.residency.unclaim(request.digest)
