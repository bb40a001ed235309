"""Who has a row of the batch and who holds pages: admission, growth, parking, preemption.

Priority holds here too (lower is more urgent). The least urgent row loses its pages first; of
equals a parked one, then the newest.
"""

from collections.abc import Callable, Collection, Iterable

from replica.scheduling.adapter import ArenaChange, PageMove
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.growth import Growth
from replica.scheduling.in_flight import InFlight
from replica.scheduling.kept_pages import KeptPages, enter
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.page_demand import PageDemand
from replica.scheduling.page_supply import PageSupply
from replica.scheduling.pages import Pages, Prefix
from replica.scheduling.request import Phase, Request
from replica.scheduling.saved_pages import SavedPages
from replica.scheduling.timeline import Event, Timelines
from replica.scheduling.waiting import Waiting

# After this many requests found no pages, a step tries no more: to try thousands takes longer than
# the step. A later, smaller request that would fit then waits for a step with fewer before it.
_TRIES = 64
# Matching so many pages of a prefix takes as long as such a try.
_MATCHED_PER_TRY = 16


class RunningSet:
    """Running and parked requests, and the KV pages of both.

    running, parked: by id; in order of priority, then of when they came.

    rows_max: most running requests.
    parked_pages_max: most device pages that parked rows may keep; None for no limit.
    saved: the pages that an admission leaves to others.
    demand: the pages that requests will need.
    """

    def __init__(
        self,
        rows_max: int,
        parked_pages_max: int | None,
        saved: SavedPages,
        pages: Pages,
        adapter_cache: AdapterCache,
        waiting: Waiting,
        timelines: Timelines,
        in_flight: InFlight,
        growth: Growth,
        copies: PageCopies,
    ) -> None:
        self.rows_max = rows_max
        self.running: dict[str, Request] = {}
        self.saved = saved
        self._pages = pages
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._timelines = timelines
        self._in_flight = in_flight
        self._growth = growth
        self._copies = copies
        self._kept = KeptPages(
            parked_pages_max, pages, copies, in_flight, growth, timelines, self.placed
        )
        self.demand = PageDemand(
            pages, copies, growth, self._kept, waiting, self.running, in_flight
        )
        self._supply = PageSupply(pages, adapter_cache, self._kept, self.running)
        self._failed_tries = 0  # requests that found no pages in this step
        self._sent_away = False  # parked rows were asked to make pages in this step

    @property
    def parked(self) -> dict[str, Request]:
        return self._kept.parked

    @property
    def full(self) -> bool:
        return len(self.running) >= self.rows_max

    def placed(self, request: Request) -> bool:
        """True if its adapter is on the device, or it needs none."""
        return request.adapter_key is None or self._adapter_cache.usable(request.adapter_key)

    def begin_step(self, draining: Collection[str], may_admit: Callable[[Request], bool]) -> None:
        """draining: adapters whose place is reserved. may_admit: False if a drain keeps it out."""
        self._failed_tries = 0
        self._sent_away = False
        self._kept.begin_step()
        self.demand.begin_step()
        self._supply.begin_step(draining)
        self.saved.begin_step(lambda request: self.placed(request) and may_admit(request))

    def take_changes(self) -> list[ArenaChange]:
        """The changes that made KV pages since the last call, in order."""
        return self._supply.take_changes()

    def lacks_pages(self, request: Request) -> bool:
        """True if neither it nor any later request without pages can get pages in this step."""
        waiter = self.saved.request
        if waiter is None or waiter is request or request.pages:
            return False
        if request.priority < waiter.priority:
            return False  # it will be the one that pages are saved for
        if self._failed_tries > _TRIES:
            return True
        return self._supply.exhausted and self._pages.free <= self.demand.peak

    def has_pages(self) -> list[Request]:
        """Requests that may be admitted though no pages are left, in no particular order."""
        parked = [r for r in self.parked.values() if self.placed(r)]
        waiter = self.saved.request
        if waiter is None or waiter.id in self.parked:
            return parked
        return [*parked, waiter]

    def admit(self, request: Request, now_s: float, alone: bool) -> bool:
        """Give it pages and a row. alone: nothing else runs, so parked rows may lose theirs.

        If its pages are in host memory, the row is not computed until they are back.
        """
        if not self._give_pages(request, now_s, alone):
            return False
        self.saved.forget(request)
        resumed = self.parked.pop(request.id, None) is not None
        if request.adapter_key is not None:
            self._adapter_cache.acquire(request.adapter_key, now_s)
        request.prefix = None
        request.slot = self._adapter_cache.slot(request.digest)
        self._waiting.remove(request)
        if request.admitted_s is None:
            request.admitted_s = now_s
        request.become(Phase.RUNNING)
        enter(self.running, request)
        self.demand.entered(request)
        self._timelines.note(request.id, now_s, Event.RESUMED if resumed else Event.RUNNING)
        return True

    def grow(self, request: Request, now_s: float) -> bool:
        """Take the page for the next token.

        If none is free, parked rows give theirs up, then the least urgent and newest running rows,
        at last `request` itself. False if it gave up its pages, or waits until those of another are
        in host memory.
        """
        size = self._pages.page_tokens
        while request.tokens > len(request.pages) * size:
            page = self._pages.take(1) or self._supply.take(1, now_s, drop=True)
            if page is not None:
                request.pages += page
                continue
            if self._kept.wait_for_page():
                return False
            newest = next(r for r in reversed(self.running.values()) if r.copying is None)
            self.preempt(newest, now_s)
            if newest is request:
                return False
        return True

    def publish(self, request: Request, end: int) -> None:
        """Make its full pages available to others; `end` tokens are computed."""
        size = self._pages.page_tokens
        fork = request.fork(size)
        for index in range(request.published, end // size):
            tokens, page = request.slice(index * size, (index + 1) * size), request.pages[index]
            request.link = self._pages.publish(request.link, tokens, page, index, fork)
            request.published = index + 1

    def park_all(self, digests: tuple[str, ...], newcomer: Request, now_s: float) -> bool:
        """Park all rows of these adapters, with their pages, for the newcomer's adapter.

        If their pages cannot stay beside what the other rows and the newcomer will need, they go to
        host memory. False, and nothing changed, if they cannot go there either: rows that lose
        their pages each time they are parked make no progress.
        """
        rows = [r for r in self.running.values() if r.adapter_key in digests]
        if any(r.copying or r.computed == r.back_at for r in rows):
            return False  # else they would be copied to and fro, and never run
        stay = [r for r in self.running.values() if r.adapter_key not in digests]
        on_device = self._kept.on_device()
        needed = 0 if newcomer in on_device else self._growth.of(newcomer)
        leave = not self._kept.may_stay(rows) or (
            needed + self._growth.peak(stay, [*on_device, *rows]) > self._pages.free
        )
        if leave:
            arriving = self._copies.arriving + sum(self._pages.sole(r.pages) for r in rows)
            needed += self._growth.peak(stay, on_device)
            if needed > self._pages.free + arriving or not self._copies.can_leave(rows):
                return False
        elif self._growth.spent >= 1:
            return False
        self.demand.parked()
        for request in rows:
            self._leave_batch(request, now_s)
            self._kept.keep(request, leave)
            self._waiting.add(request)
            self._timelines.note(request.id, now_s, Event.PARKED)
        return True

    @property
    def short_of_pages(self) -> bool:
        """True if a request whose adapter is on the device finds no pages."""
        return self.saved.request is not None

    def has_pages_for(self, request: Request) -> bool:
        missing = self._pages.needed(request.tokens) - self._pages.free
        return (
            bool(request.pages)
            or missing <= 0
            or missing <= self._adapter_cache.victim_search.evictable_pages()
        )

    def preempt(self, request: Request, now_s: float) -> None:
        """Take its row and its pages. They go to host memory, or are lost if they cannot."""
        self._leave_batch(request, now_s)
        if self._copies.can_leave([request]):
            self._kept.keep(request, leave=True)
            self._waiting.add(request)
            self._timelines.note(request.id, now_s, Event.PREEMPTED, "pages copied to the host")
            return
        self._kept.lose(request)
        request.become(Phase.WAITING)
        self._waiting.add(request)
        self._timelines.note(request.id, now_s, Event.PREEMPTED)

    def free_parked(self, count: int, now_s: float) -> None:
        """Parked rows give up their pages, least urgent first, if that makes `count` free."""
        self._kept.free(count, now_s)

    @property
    def nothing_runs(self) -> bool:
        """True if nothing runs or is copied, so nothing frees memory by itself."""
        idle = not self.running and not self._in_flight.plans
        return idle and not self._copies.in_progress

    def rename(self, moves: Iterable[PageMove]) -> None:
        """Pages that rows hold have moved."""
        renamed = {move.source: move.target for move in moves}
        if renamed:
            ended = self._in_flight.deferred_free
            for request in [*self.running.values(), *self.parked.values(), *ended]:
                request.pages = [renamed.get(page, page) for page in request.pages]
            self._copies.rename(renamed)

    def end(self, request: Request, phase: Phase, now_s: float) -> None:
        """It leaves for good, from any phase. Its pages are freed later by `free`.

        Unless requests wait for pages, host memory keeps a copy of them first.
        """
        if request.phase is Phase.RUNNING:
            self._leave_batch(request, now_s)
        else:
            self._waiting.remove(request)
            self.parked.pop(request.id, None)
        self.saved.forget(request)
        if phase in (Phase.FINISHED, Phase.CANCELLED) and not self.short_of_pages:
            self._copies.save(request)
        request.become(phase)

    def free(self, request: Request) -> None:
        """No step and no copy references it any more."""
        self._copies.release(request)

    def check(self) -> None:
        for rows in (self.running.values(), self.parked.values()):
            assert list(rows) == sorted(rows, key=lambda r: r.priority), "priority lost"
        assert len(self.running) <= self.rows_max
        self._kept.check()
        self.demand.check()

    def _give_pages(self, request: Request, now_s: float, alone: bool) -> bool:
        resumes = bool(request.pages)  # the pages it will need are already left free
        returns = bool(request.host_pages)
        missing = None if resumes or alone else self._surely_missing(request, now_s)
        if missing is not None:
            self._pass_over(request, missing, now_s)
            return False
        found = () if resumes else self._find_prefix(request)
        count = self._pages.needed(request.tokens) - len(request.pages)
        if count <= 0:
            self._kept.came_back(request, len(found))
            return True
        saved = self.saved.from_request(request, now_s)
        kept = 0 if alone else self.saved.from_request_for_adapter(request)
        grown = 0
        if not (alone or resumes or self.demand.fits_whole(request, saved + kept)):
            grown = self.demand.beside(request)
            if not returns:
                grown += max(self._growth.of(request) - count, 0) + self._kept.owed_before(request)
            if count + grown - self._pages.free > 0:
                self._supply.make(count + grown - self._pages.free, now_s, False, request)
        pages = None
        if not (saved or kept or grown) or self._pages.free - count >= saved + kept + grown:
            pages = self._supply.take(count, now_s, drop=alone, requester=request)
        if pages is None:
            self._pass_over(request, count + kept + grown - self._pages.free, now_s)
            self._failed_tries += len(found) // _MATCHED_PER_TRY
            if found:
                self._kept.forget(request)
                if not returns:
                    request.computed = 0
            return False
        request.pages += pages
        if not (resumes or returns):
            self._copies.bring(request, len(found), _matchable(request))
        self._kept.came_back(request, len(found))
        if not resumes:
            self.demand.admitted(request)
        return True

    def _surely_missing(self, request: Request, now_s: float) -> int | None:
        """Pages that it lacks even with all that idle adapters would yield; None if it may fit.

        It spares `_give_pages` from matching a prefix, only to give it back.
        """
        left = self.saved.from_request_for_adapter(request)
        saved = self.saved.from_request(request, now_s)
        if self.demand.fits_whole(request, left + saved):
            return None
        matched = unheld = 0
        if request.prefix is None:
            fork = request.fork(self._pages.page_tokens)
            if self._pages.may_match(request.root, request.prompt, fork):
                return None
        elif not self._is_current(request.prefix, request):
            return None
        else:
            matched, unheld = len(request.prefix.pages), self._pages.unheld(request.prefix)
        needed = self.demand.beside(request) - matched
        if request.host_pages:
            needed += self._pages.needed(request.tokens)
        else:
            needed += self._growth.of(request) + self._kept.owed_before(request)
        missing = needed - (self._pages.free - unheld)
        if missing <= 0:
            may_fit = missing + left + saved <= 0
        else:
            may_fit = self._supply.may_yield(missing)
        if may_fit:
            return None
        if unheld and request.prefix is not None:
            self._pages.touch(request.prefix)
        return missing + left

    def _is_current(self, prefix: Prefix, request: Request) -> bool:
        """True if the prefix cache still has the same prefix of it."""
        start = len(prefix.pages) * self._pages.page_tokens
        end = start + self._pages.page_tokens
        following = request.slice(start, end) if end <= _matchable(request) else ()
        return self._pages.still_longest(prefix, following, request.fork(end - start))

    def _pass_over(self, request: Request, missing: int, now_s: float) -> None:
        """It finds no pages. Parked rows may make those that are missing."""
        self._failed_tries += 1
        if self.saved.from_request(request, now_s):
            return  # pages are saved for the one passed over before it
        sent_away, self._sent_away = self._sent_away, True
        if not sent_away and self._kept.send_away(missing):
            self.demand.parked()
            return
        self.saved.pass_over(request, now_s)

    def _find_prefix(self, request: Request) -> tuple[int, ...]:
        """Hold its cached prefix, but not its last token, whose logits choose the next one."""
        tokens = request.slice(0, request.tokens)
        fork = request.fork(self._pages.page_tokens)
        prefix = self._pages.match(request.root, tokens, _matchable(request), fork)
        request.prefix = prefix
        request.pages = list(prefix.pages)
        request.link = prefix.link
        request.published = len(prefix.pages)
        if request.host_pages:
            return prefix.pages
        request.computed = len(prefix.pages) * self._pages.page_tokens
        if not request.begun:
            request.cached = request.computed
        return prefix.pages

    def _leave_batch(self, request: Request, now_s: float) -> None:
        del self.running[request.id]
        self.demand.left(request)
        if request.adapter_key is not None:
            self._adapter_cache.release(request.adapter_key, now_s)


def _matchable(request: Request) -> int:
    """How many tokens of a cached prefix it can use: not the last, whose logits choose the next.

    Nor tokens beyond those in its pages in host memory. None while the log-probabilities of its
    prompt are wanted: others have computed keys and values, but not these.
    """
    most = request.tokens - 1
    if request.host_pages:
        return min(request.computed, most)
    return 0 if request.sampling.prompt_logprobs is not None and not request.begun else most
