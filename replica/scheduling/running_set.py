"""Who has a row of the batch and who holds pages: admission, growth, parking, preemption."""

import math
from collections.abc import Collection, Iterable

from replica.scheduling.adapter import ArenaChange, PageMove
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.growth import Growth
from replica.scheduling.in_flight import InFlight
from replica.scheduling.pages import Pages
from replica.scheduling.request import Phase, Request
from replica.scheduling.timeline import Event, Timelines
from replica.scheduling.waiting import Waiting

# After this many requests found no pages, a step tries no more: to try thousands takes longer than
# the step. A later, smaller request that would fit then waits for a step with fewer before it.
_TRIES = 64


class RunningSet:
    """Running and parked requests, and the KV pages of both.

    rows_max: most running requests.
    parked_pages_max: most pages that parked rows may hold; None for no limit.
    page_wait_max_s: how long a request without pages may be passed over before free pages are saved
        for it. None: nothing ever passes it.
    """

    def __init__(
        self,
        rows_max: int,
        parked_pages_max: int | None,
        page_wait_max_s: float | None,
        pages: Pages,
        adapter_cache: AdapterCache,
        waiting: Waiting,
        timelines: Timelines,
        in_flight: InFlight,
        growth: Growth,
    ) -> None:
        self.rows_max = rows_max
        self.running: dict[str, Request] = {}
        self.parked: dict[str, Request] = {}
        self.page_wait_max_s = page_wait_max_s
        self._parked_pages_max = parked_pages_max
        self._pages = pages
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._timelines = timelines
        self._in_flight = in_flight
        self._growth = growth
        self._peak: int | None = None  # pages that rows will need, as of this step
        self._pages_suffice: bool | None = None
        self._evictable: int | None = None  # pages that idle adapters would yield, as of this step
        self._failed_tries = 0  # requests that found no pages in this step
        self._passed_over: tuple[Request, float] | None = None
        self._kept_free: tuple[int, float] = (0, math.inf)
        self._arena_changes: list[ArenaChange] = []
        self._draining: Collection[str] = ()
        # In this step idle adapters cannot yield this many pages, nor more.
        self._unattainable: float = math.inf

    @property
    def full(self) -> bool:
        return len(self.running) >= self.rows_max

    def placed(self, request: Request) -> bool:
        """True if its adapter is on the device, or it needs none."""
        return request.adapter_key is None or self._adapter_cache.usable(request.adapter_key)

    def begin_step(self, arena_changes: list[ArenaChange], draining: Collection[str]) -> None:
        """arena_changes: where changes that make KV pages are added.
        draining: adapters whose place is reserved.
        """
        self._arena_changes, self._draining = arena_changes, draining
        self._peak = self._pages_suffice = self._evictable = None
        self._failed_tries = 0
        self._kept_free = (0, math.inf)
        self._unattainable = math.inf
        if self._passed_over is not None and not self.placed(self._passed_over[0]):
            self._passed_over = None  # its adapter left: pages would not help it

    def lacks_pages(self, request: Request) -> bool:
        """True if neither it nor any later request without pages can get pages in this step."""
        waiter = self._passed_over
        if waiter is None or waiter[0] is request or request.pages:
            return False
        if self._failed_tries > _TRIES:
            return True
        unshared = self._adapter_cache.budget is None or self._unattainable <= 1
        return unshared and self._pages.free <= self.peak

    def has_pages(self) -> list[Request]:
        """Requests that may be admitted though no pages are left, in no particular order."""
        parked = [r for r in self.parked.values() if self.placed(r)]
        if self._passed_over is None or self._passed_over[0].id in self.parked:
            return parked
        return [*parked, self._passed_over[0]]

    def admit(self, request: Request, now_s: float, alone: bool) -> bool:
        """Give it pages and a row. alone: nothing else runs, so parked rows may lose theirs."""
        if not self._give_pages(request, now_s, alone):
            return False
        if self._is_passed_over(request):
            self._passed_over = None
        resumed = self.parked.pop(request.id, None) is not None
        if request.adapter_key is not None:
            self._adapter_cache.acquire(request.adapter_key, now_s)
        request.slot = self._adapter_cache.slot(request.digest)
        self._waiting.remove(request)
        request.become(Phase.RUNNING)
        self.running[request.id] = request
        self._timelines.note(request.id, now_s, Event.RESUMED if resumed else Event.RUNNING)
        return True

    def grow(self, request: Request, now_s: float) -> bool:
        """Take the page for the next token.

        If none is free, parked rows lose theirs, then the newest running rows, at last `request`
        itself. False if it lost its pages.
        """
        while self._pages.needed(request.tokens) > len(request.pages):
            page = self._take(1, now_s, drop=True)
            if page is not None:
                request.pages += page
                continue
            newest = next(reversed(self.running.values()))
            self.preempt(newest, now_s)
            if newest is request:
                return False
        return True

    def publish(self, request: Request, end: int) -> None:
        """Make its full pages available to others; `end` tokens are computed."""
        size = self._pages.page_tokens
        for index in range(request.published, end // size):
            tokens = request.slice(index * size, (index + 1) * size)
            request.link = self._pages.publish(request.link, tokens, request.pages[index])
            request.published = index + 1

    def park_all(self, digests: tuple[str, ...], newcomer: Request, now_s: float) -> bool:
        """Park all rows of these adapters, with their pages, for the newcomer's adapter.

        False, and nothing changed, if their pages could not stay beside what the other rows and the
        newcomer will need: rows that lose their pages each time they are parked make no progress.
        """
        rows = [r for r in self.running.values() if r.adapter_key in digests]
        held = self._parked_pages() + sum(len(r.pages) for r in rows)
        if self._parked_pages_max is not None and held > self._parked_pages_max:
            return False
        stay = [r for r in self.running.values() if r.adapter_key not in digests]
        needed = self._growth.peak(stay, [*self.parked.values(), *rows])
        if newcomer.id not in self.parked:
            needed += self._growth.of(newcomer)
        if self._growth.spent >= 1 or needed > self._pages.free:
            return False
        self._peak = None
        for request in rows:
            self._leave_batch(request, now_s)
            request.become(Phase.PARKED)
            self.parked[request.id] = request
            self._waiting.add(request)
            self._timelines.note(request.id, now_s, Event.PARKED)
        return True

    @property
    def short_of_pages(self) -> bool:
        """True if a request whose adapter is on the device finds no pages."""
        return self._passed_over is not None

    @property
    def pages_suffice(self) -> bool:
        """True if there are pages for all waiting requests, beside what the others will need."""
        if self._pages_suffice is None:
            left = self._pages.free - self.peak
            for request in self._waiting:
                if left < 0:
                    break
                if not request.pages:
                    left -= self._growth.of(request)
            self._pages_suffice = left >= 0
        return self._pages_suffice

    def has_pages_for(self, request: Request) -> bool:
        missing = self._pages.needed(request.tokens) - self._pages.free
        return (
            bool(request.pages)
            or missing <= 0
            or missing <= self._adapter_cache.victim_search.evictable_pages()
        )

    def keep_free(self, count: int, since_s: float) -> None:
        """In this step no admission may leave fewer than `count` pages free.

        They are for an adapter that starves since `since_s`. A request that was passed over since
        before then is exempt.
        """
        self._kept_free = count, since_s

    def saved_before(self, since_s: float, now_s: float) -> int:
        """Pages being saved for a request that has been passed over since `since_s` or earlier."""
        saved = self._saved(now_s)
        return saved if self._passed_over is not None and self._passed_over[1] <= since_s else 0

    def preempt(self, request: Request, now_s: float) -> None:
        """Take its row and its pages."""
        self._leave_batch(request, now_s)
        self._lose_pages(request)
        request.become(Phase.WAITING)
        self._waiting.add(request)
        self._timelines.note(request.id, now_s, Event.PREEMPTED)

    def free_parked(self, count: int, now_s: float) -> None:
        """Drop the pages of parked rows, newest first, if that makes `count` free."""
        if self._pages.free + self._parked_pages() < count:
            return
        while self.parked and self._pages.free < count:
            self._drop_pages(next(reversed(self.parked.values())), now_s)

    @property
    def nothing_runs(self) -> bool:
        """True if nothing runs, so nothing frees memory by itself."""
        return not self.running and not self._in_flight.plans

    def rename(self, moves: Iterable[PageMove]) -> None:
        """Pages that rows hold have moved."""
        renamed = {move.source: move.target for move in moves}
        if renamed:
            ended = self._in_flight.deferred_free
            for request in [*self.running.values(), *self.parked.values(), *ended]:
                request.pages = [renamed.get(page, page) for page in request.pages]

    def end(self, request: Request, now_s: float) -> None:
        """It leaves for good, from any phase. Its pages are freed later by `free`."""
        if request.phase is Phase.RUNNING:
            self._leave_batch(request, now_s)
        else:
            self._waiting.remove(request)
            self.parked.pop(request.id, None)
        if self._is_passed_over(request):
            self._passed_over = None

    def free(self, request: Request) -> None:
        """No step references it any more."""
        self._pages.give_back(request.pages)
        request.pages = []

    def check(self) -> None:
        assert len(self.running) <= self.rows_max
        most = self._parked_pages_max
        assert most is None or self._parked_pages() <= most

    def _give_pages(self, request: Request, now_s: float, alone: bool) -> bool:
        resumes = bool(request.pages)  # the pages it will need are already left free
        if not (resumes or alone or self._may_fit(request)):
            self._pass_over(request, now_s)
            return False
        found = () if resumes else self._find_prefix(request)
        count = self._pages.needed(request.tokens) - len(request.pages)
        if count <= 0:
            return True
        saved = 0 if self._is_overdue(request, now_s) else self._saved(now_s)
        kept = 0 if alone else self._must_leave(request)
        grown = 0
        if not (alone or resumes):
            grown = self.peak + max(self._growth.of(request) - count, 0)
            if count + grown - self._pages.free > 0:
                self._make_pages(count + grown - self._pages.free, now_s, False, request)
        pages = None
        if not (saved or kept or grown) or self._pages.free - count >= saved + kept + grown:
            pages = self._take(count, now_s, drop=alone, requester=request)
        if pages is None:
            if not saved:
                self._pass_over(request, now_s)
            if found:
                self._forget_pages(request)
            return False
        request.pages += pages
        if not resumes and self._peak is not None:
            self._peak += max(self._growth.of(request), 0)
        return True

    @property
    def peak(self) -> int:
        """Pages that running and parked rows will need beyond those they hold."""
        if self._peak is None:
            self._peak = self._growth.peak(self.running.values(), self.parked.values())
        return self._peak

    def _may_fit(self, request: Request) -> bool:
        """False only if there are too few pages even with all that idle adapters would yield."""
        if self._pages.may_match(request.digest, request.prompt):
            return True
        missing = self._pages.needed(request.tokens) + self.peak - self._pages.free
        if missing <= 0:
            return True
        if self._evictable is None:
            self._evictable = self._adapter_cache.victim_search.evictable_pages()
        return missing <= self._evictable

    def _pass_over(self, request: Request, now_s: float) -> None:
        self._failed_tries += 1
        if self._passed_over is None:
            self._passed_over = (request, now_s)

    def _find_prefix(self, request: Request) -> tuple[int, ...]:
        """Hold its cached prefix, but not its last token, whose logits choose the next one."""
        tokens = request.slice(0, request.tokens)
        prefix = self._pages.match(request.digest, tokens, request.tokens - 1)
        request.pages = list(prefix.pages)
        request.link = prefix.link
        request.published = len(prefix.pages)
        request.computed = len(prefix.pages) * self._pages.page_tokens
        if not request.begun:
            request.cached = request.computed
        return prefix.pages

    def _take(
        self, count: int, now_s: float, drop: bool, requester: Request | None = None
    ) -> list[int] | None:
        """Take pages. Idle adapters may have to leave for them, but not the requester's.

        drop: adapters that requests wait for may also leave, and then parked rows other than
            `requester` may lose their pages, newest first.
        """
        while (pages := self._pages.take(count)) is None:
            if self._make_pages(count - self._pages.free, now_s, drop, requester):
                continue
            newest = next((r for r in reversed(self.parked.values()) if r is not requester), None)
            if newest is None or not drop:
                return None
            self._drop_pages(newest, now_s)
        return pages

    def _make_pages(
        self, count: int, now_s: float, wanted: bool, requester: Request | None
    ) -> bool:
        if self._adapter_cache.budget is None or (count >= self._unattainable and not wanted):
            return False
        keep = set(self._draining)
        if requester is not None and requester.adapter_key:
            keep.add(requester.adapter_key)
        change = self._adapter_cache.make_pages(count, keep, wanted, now_s)
        if change is None and not wanted:
            self._unattainable = count
        if change is not None and (change.evictions or change.slides):
            self._arena_changes.append(change)
        return change is not None

    def _must_leave(self, request: Request) -> int:
        """Pages that it must leave free for an adapter, unless it was passed over earlier."""
        count, since_s = self._kept_free
        waiter = self._passed_over
        return 0 if waiter and waiter[0] is request and waiter[1] <= since_s else count

    def _is_passed_over(self, request: Request) -> bool:
        return self._passed_over is not None and self._passed_over[0] is request

    def _is_overdue(self, request: Request, now_s: float) -> bool:
        """True if it was passed over for so long that pages are saved for it."""
        if self._passed_over is None or self.page_wait_max_s is None:
            return False
        waiter, since_s = self._passed_over
        return waiter is request and now_s - since_s > self.page_wait_max_s

    def _saved(self, now_s: float) -> int:
        """Pages being saved for a request that was passed over for too long."""
        if self._passed_over is None or not self._is_overdue(self._passed_over[0], now_s):
            return 0
        request = self._passed_over[0]
        return self._pages.needed(request.tokens) - len(request.pages)

    def _parked_pages(self) -> int:
        return sum(len(request.pages) for request in self.parked.values())

    def _leave_batch(self, request: Request, now_s: float) -> None:
        del self.running[request.id]
        if request.adapter_key is not None:
            self._adapter_cache.release(request.adapter_key, now_s)

    def _drop_pages(self, request: Request, now_s: float) -> None:
        """A parked request loses its pages, and later computes its tokens again."""
        del self.parked[request.id]
        self._lose_pages(request)
        request.become(Phase.WAITING)
        self._timelines.note(request.id, now_s, Event.PREEMPTED, "pages dropped while parked")

    def _lose_pages(self, request: Request) -> None:
        request.lost = max(request.lost, request.computed)
        self._forget_pages(request)

    def _forget_pages(self, request: Request) -> None:
        self._in_flight.reuse_pages_of(request)
        self._pages.give_back(request.pages)
        request.pages = []
        request.computed = request.published = 0
