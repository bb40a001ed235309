"""Who is on the batch and who holds pages: admission, growth, parking, giving pages up."""

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

# So many requests look for pages in one step when there are none for the first of them. A later one
# that is small enough for what is free then waits for a step in which fewer stand before it; asking
# thousands would take longer than the step itself.
_TRIES = 64


class RunningSet:
    """Running and parked requests, and the KV pages of both.

    rows_max: running requests. parked_pages_max: pages that parked rows may hold; None: all.
    page_wait_max_s: how long a request may be passed over for want of pages before the pages that
    come free are saved for it; None: others never pass it anyway.
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
        self._peak: int | None = None  # pages that rows will need, of this step
        self._ample: bool | None = None
        self._spare: int | None = None  # pages that idle adapters would leave, at its beginning
        self._fruitless = 0  # requests that found no pages in this step
        self._passed_over: tuple[Request, float] | None = None
        self._kept: tuple[int, float] = (0, math.inf)
        self._arena_changes: list[ArenaChange] = []
        self._draining: Collection[str] = ()
        self._none_from: float = math.inf  # pages that no idle adapters make in this step, or more

    @property
    def full(self) -> bool:
        return len(self.running) >= self.rows_max

    def placed(self, request: Request) -> bool:
        """Its adapter is on the device, or it needs none."""
        return request.adapter_key is None or self._adapter_cache.usable(request.adapter_key)

    def begin_step(self, arena_changes: list[ArenaChange], draining: Collection[str]) -> None:
        """rooms: where to put what makes room for pages. draining: whose place is promised."""
        self._arena_changes, self._draining = arena_changes, draining
        self._peak = self._ample = self._spare = None
        self._fruitless = 0
        self._kept = (0, math.inf)
        self._none_from = math.inf
        if self._passed_over is not None and not self.placed(self._passed_over[0]):
            self._passed_over = None  # its adapter left meanwhile: pages would not help it

    def lacks_pages(self, request: Request) -> bool:
        """There are no pages for it; nor for others, but for parked rows that kept theirs."""
        waiter = self._passed_over
        if waiter is None or waiter[0] is request or request.pages:
            return False
        if self._fruitless > _TRIES:
            return True
        unshared = self._adapter_cache.budget is None or self._none_from <= 1
        return unshared and self._pages.free <= self.peak

    def has_pages(self) -> list[Request]:
        """Those that may get on the batch though there are no pages, in no particular order."""
        parked = [r for r in self.parked.values() if self.placed(r)]
        if self._passed_over is None or self._passed_over[0].id in self.parked:
            return parked
        return [*parked, self._passed_over[0]]

    def admit(self, request: Request, now_s: float, alone: bool) -> bool:
        """Onto the batch. alone: nothing else runs in this step, so parked pages may be dropped."""
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
        """A page for the next token; parked rows give theirs up, then newer ones, at last this."""
        while self._pages.needed(request.tokens) > len(request.pages):
            page = self._take(1, now_s, drop=True)
            if page is not None:
                request.pages += page
                continue
            newest = next(reversed(self.running.values()))
            self._preempt(newest, now_s)
            if newest is request:
                return False
        return True

    def publish(self, request: Request, end: int) -> None:
        """Let others find the pages that are full by now: `end` tokens are computed."""
        size = self._pages.page_tokens
        for index in range(request.published, end // size):
            tokens = request.slice(index * size, (index + 1) * size)
            request.link = self._pages.publish(request.link, tokens, request.pages[index])
            request.published = index + 1

    def park_all(self, places: tuple[str, ...], newcomer: Request, now_s: float) -> bool:
        """All rows of these adapters, with their pages, for the newcomer's. False, and nothing
        done, if these pages could not stay beside what the others and the newcomer will need.

        Rows that lost their pages each time they were parked would get nowhere.
        """
        rows = [r for r in self.running.values() if r.adapter_key in places]
        held = self._parked_pages() + sum(len(r.pages) for r in rows)
        if self._parked_pages_max is not None and held > self._parked_pages_max:
            return False
        stay = [r for r in self.running.values() if r.adapter_key not in places]
        needed = self._growth.peak(stay, [*self.parked.values(), *rows])
        if newcomer.id not in self.parked:
            needed += self._growth.of(newcomer)
        if self._growth.spent >= 1 or needed > self._pages.free:
            return False
        self._peak = None
        for request in rows:
            self._off(request, now_s)
            request.become(Phase.PARKED)
            self.parked[request.id] = request
            self._waiting.add(request)
            self._timelines.note(request.id, now_s, Event.PARKED)
        return True

    @property
    def short(self) -> bool:
        """A request that could run finds no pages."""
        return self._passed_over is not None

    @property
    def ample(self) -> bool:
        """There are pages for all that wait, beside what the others will need."""
        if self._ample is None:
            left = self._pages.free - self.peak
            for request in self._waiting:
                if left < 0:
                    break
                if not request.pages:
                    left -= self._growth.of(request)
            self._ample = left >= 0
        return self._ample

    def has_pages_for(self, request: Request) -> bool:
        missing = self._pages.needed(request.tokens) - self._pages.free
        return (
            bool(request.pages)
            or missing <= 0
            or missing <= self._adapter_cache.victim_search.spare_pages()
        )

    def keep_free(self, count: int, since_s: float) -> None:
        """In this step no request gets on that would leave less than `count` pages free.

        They are for an adapter that starves since `since_s`; a request that was passed over for too
        long, and before that, goes first.
        """
        self._kept = count, since_s

    def saved_before(self, since_s: float, now_s: float) -> int:
        """Pages that are being saved for a request that has waited for longer than this."""
        saved = self._saved(now_s)
        return saved if self._passed_over is not None and self._passed_over[1] <= since_s else 0

    def free_parked(self, count: int, now_s: float) -> None:
        """Parked rows give their pages up, the newest first, for `count` to be free."""
        if self._pages.free + self._parked_pages() < count:
            return
        while self.parked and self._pages.free < count:
            self._drop_pages(next(reversed(self.parked.values())), now_s)

    @property
    def still(self) -> bool:
        """Nothing runs, and so nothing will give up anything by itself."""
        return not self.running and not self._in_flight.plans

    def rename(self, moves: Iterable[PageMove]) -> None:
        """The pages that rows hold lie elsewhere from now on."""
        renamed = {move.source: move.target for move in moves}
        if renamed:
            ended = self._in_flight.deferred_free
            for request in [*self.running.values(), *self.parked.values(), *ended]:
                request.pages = [renamed.get(page, page) for page in request.pages]

    def end(self, request: Request, now_s: float) -> None:
        """It leaves for good, wherever it was; its pages are to be freed."""
        if request.phase is Phase.RUNNING:
            self._off(request, now_s)
        else:
            self._waiting.remove(request)
            self.parked.pop(request.id, None)
        if self._is_passed_over(request):
            self._passed_over = None

    def free(self, request: Request) -> None:
        """No step names it any more."""
        self._pages.give_back(request.pages)
        request.pages = []

    def check(self) -> None:
        assert len(self.running) <= self.rows_max
        most = self._parked_pages_max
        assert most is None or self._parked_pages() <= most

    def _give_pages(self, request: Request, now_s: float, alone: bool) -> bool:
        back = bool(request.pages)  # what it will need is left free already
        if not (back or alone or self._may_fit(request)):
            self._pass_over(request, now_s)
            return False
        found = self._find_prefix(request) if not back else ()
        count = self._pages.needed(request.tokens) - len(request.pages)
        if count <= 0:
            return True
        saved = 0 if self._saves_for(request, now_s) else self._saved(now_s)
        kept = 0 if alone else self._kept_from(request)
        grown = 0
        if not (alone or back):
            grown = self.peak + max(self._growth.of(request) - count, 0)
            if count + grown - self._pages.free > 0:
                self._make_pages(count + grown - self._pages.free, now_s, False, request)
        pages = None
        if not (saved or kept or grown) or self._pages.free - count >= saved + kept + grown:
            pages = self._take(count, now_s, drop=alone, spare=request)
        if pages is None and not saved:
            self._pass_over(request, now_s)
        if pages is None:
            if found:
                self._forget_pages(request)
            return False
        request.pages += pages
        if not back and self._peak is not None:
            self._peak += max(self._growth.of(request), 0)
        return True

    @property
    def peak(self) -> int:
        """Pages that rows of the batch and parked ones will need."""
        if self._peak is None:
            self._peak = self._growth.peak(self.running.values(), self.parked.values())
        return self._peak

    def _may_fit(self, request: Request) -> bool:
        """False only where even with all that idle adapters give there are too few pages."""
        if self._pages.may_match(request.digest, request.prompt):
            return True
        missing = self._pages.needed(request.tokens) + self.peak - self._pages.free
        if missing <= 0:
            return True
        if self._spare is None:
            self._spare = self._adapter_cache.victim_search.spare_pages()
        return missing <= self._spare

    def _pass_over(self, request: Request, now_s: float) -> None:
        self._fruitless += 1
        if self._passed_over is None:
            self._passed_over = (request, now_s)

    def _find_prefix(self, request: Request) -> tuple[int, ...]:
        """At least one token is left to compute: its logits choose the next one."""
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
        self, count: int, now_s: float, drop: bool, spare: Request | None = None
    ) -> list[int] | None:
        """Idle adapters may have to leave for them, but not `spare`'s.

        drop: even one that is waited for, and then parked rows may lose theirs, the newest first,
        but never `spare`.
        """
        while (pages := self._pages.take(count)) is None:
            if self._make_pages(count - self._pages.free, now_s, drop, spare):
                continue
            newest = next((r for r in reversed(self.parked.values()) if r is not spare), None)
            if newest is None or not drop:
                return None
            self._drop_pages(newest, now_s)
        return pages

    def _make_pages(self, count: int, now_s: float, wanted: bool, spare: Request | None) -> bool:
        if self._adapter_cache.budget is None or (count >= self._none_from and not wanted):
            return False
        keep = set(self._draining)
        if spare is not None and spare.adapter_key:
            keep.add(spare.adapter_key)
        change = self._adapter_cache.make_pages(count, keep, wanted, now_s)
        if change is None and not wanted:
            self._none_from = count
        if change is not None and (change.evictions or change.slides):
            self._arena_changes.append(change)
        return change is not None

    def _kept_from(self, request: Request) -> int:
        """Pages that it must leave for an adapter, unless it has waited for longer than that."""
        count, since_s = self._kept
        waiter = self._passed_over
        return 0 if waiter and waiter[0] is request and waiter[1] <= since_s else count

    def _is_passed_over(self, request: Request) -> bool:
        return self._passed_over is not None and self._passed_over[0] is request

    def _saves_for(self, request: Request, now_s: float) -> bool:
        """Whether it was passed over for so long that others must leave it pages."""
        if self._passed_over is None or self.page_wait_max_s is None:
            return False
        waiter, since_s = self._passed_over
        return waiter is request and now_s - since_s > self.page_wait_max_s

    def _saved(self, now_s: float) -> int:
        """Pages that are being saved for a request that was passed over for too long."""
        if self._passed_over is None or not self._saves_for(self._passed_over[0], now_s):
            return 0
        request = self._passed_over[0]
        return self._pages.needed(request.tokens) - len(request.pages)

    def _parked_pages(self) -> int:
        return sum(len(request.pages) for request in self.parked.values())

    def _off(self, request: Request, now_s: float) -> None:
        del self.running[request.id]
        if request.adapter_key is not None:
            self._adapter_cache.release(request.adapter_key, now_s)

    def _drop_pages(self, request: Request, now_s: float) -> None:
        """A parked request computes its tokens again when its turn comes."""
        del self.parked[request.id]
        self._lose_pages(request)
        request.become(Phase.WAITING)
        self._timelines.note(request.id, now_s, Event.PREEMPTED, "pages dropped while parked")

    def _preempt(self, request: Request, now_s: float) -> None:
        self._off(request, now_s)
        self._lose_pages(request)
        request.become(Phase.WAITING)
        self._waiting.add(request)
        self._timelines.note(request.id, now_s, Event.PREEMPTED)

    def _lose_pages(self, request: Request) -> None:
        request.lost = max(request.lost, request.computed)
        self._forget_pages(request)

    def _forget_pages(self, request: Request) -> None:
        self._in_flight.took_from(request)
        self._pages.give_back(request.pages)
        request.pages = []
        request.computed = request.published = 0
