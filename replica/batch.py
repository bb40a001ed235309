"""Who is on the batch and who holds pages: admission, growth, parking, giving pages up."""

from replica.flight import Flight
from replica.pages import Pages
from replica.request import Phase, Request
from replica.residency import Residency
from replica.story import Event, Stories
from replica.waiting import Waiting


class Batch:
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
        residency: Residency,
        waiting: Waiting,
        stories: Stories,
        flight: Flight,
    ) -> None:
        self.rows_max = rows_max
        self.running: dict[str, Request] = {}
        self.parked: dict[str, Request] = {}
        self.page_wait_max_s = page_wait_max_s
        self._parked_pages_max = parked_pages_max
        self._pages = pages
        self._residency = residency
        self._waiting = waiting
        self._stories = stories
        self._flight = flight
        self._passed_over: tuple[Request, float] | None = None

    @property
    def full(self) -> bool:
        return len(self.running) >= self.rows_max

    def placed(self, request: Request) -> bool:
        """Its adapter is on the device, or it needs none."""
        return request.place is None or self._residency.usable(request.place)

    def begin_step(self) -> None:
        if self._passed_over is not None and not self.placed(self._passed_over[0]):
            self._passed_over = None  # its adapter left meanwhile: pages would not help it

    def hopeless(self, request: Request) -> bool:
        """There are no pages for it; nor for others, but for parked rows that kept theirs."""
        return (
            self._pages.free == 0
            and not request.pages
            and self._passed_over is not None
            and self._passed_over[0] is not request
        )

    def admit(self, request: Request, now_s: float, alone: bool) -> bool:
        """Onto the batch. alone: nothing else runs in this step, so parked pages may be dropped."""
        if not self._give_pages(request, now_s, alone):
            return False
        if self._is_passed_over(request):
            self._passed_over = None
        resumed = self.parked.pop(request.id, None) is not None
        if request.place is not None:
            self._residency.acquire(request.place, now_s)
        request.slot = self._residency.slot(request.digest)
        self._waiting.remove(request)
        request.become(Phase.RUNNING)
        self.running[request.id] = request
        self._stories.note(request.id, now_s, Event.RESUMED if resumed else Event.RUNNING)
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

    def park_all(self, places: tuple[str, ...], now_s: float) -> bool:
        """All rows of these adapters, with their pages; False, and nothing done, if too many.

        Rows that lost their pages each time they were parked would get nowhere.
        """
        rows = [r for r in self.running.values() if r.place in places]
        held = self._parked_pages() + sum(len(r.pages) for r in rows)
        if self._parked_pages_max is not None and held > self._parked_pages_max:
            return False
        for request in rows:
            self._off(request, now_s)
            request.become(Phase.PARKED)
            self.parked[request.id] = request
            self._waiting.add(request)
            self._stories.note(request.id, now_s, Event.PARKED)
        return True

    def has_pages_for(self, request: Request) -> bool:
        return bool(request.pages) or self._pages.free >= self._pages.needed(request.tokens)

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
        found = self._find_prefix(request) if not request.pages else ()
        count = self._pages.needed(request.tokens) - len(request.pages)
        if count <= 0:
            return True
        patient, saved = False, 0
        if self._passed_over is not None:
            patient = self._saves_for(request, now_s)
            saved = 0 if patient else self._saved(now_s)
        pages = None
        if not saved or self._pages.free - count >= saved:
            pages = self._take(count, now_s, drop=alone or patient, spare=request)
            if pages is None and self._passed_over is None:
                self._passed_over = (request, now_s)
        if pages is None:
            if found:
                self._forget_pages(request)
            return False
        request.pages += pages
        return True

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
        """drop: parked rows may lose theirs, the newest first, but never `spare`."""
        while (pages := self._pages.take(count)) is None:
            newest = next((r for r in reversed(self.parked.values()) if r is not spare), None)
            if newest is None or not drop:
                return None
            self._drop_pages(newest, now_s)
        return pages

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
        if request.place is not None:
            self._residency.release(request.place, now_s)

    def _drop_pages(self, request: Request, now_s: float) -> None:
        """A parked request computes its tokens again when its turn comes."""
        del self.parked[request.id]
        self._forget_pages(request)
        request.become(Phase.WAITING)
        self._stories.note(request.id, now_s, Event.PREEMPTED, "pages dropped while parked")

    def _preempt(self, request: Request, now_s: float) -> None:
        self._off(request, now_s)
        self._forget_pages(request)
        request.become(Phase.WAITING)
        self._waiting.add(request)
        self._stories.note(request.id, now_s, Event.PREEMPTED)

    def _forget_pages(self, request: Request) -> None:
        self._flight.took_from(request)
        self._pages.give_back(request.pages)
        request.pages = []
        request.computed = request.published = 0
