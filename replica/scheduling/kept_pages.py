"""The KV pages of requests without a row: they stay on the device, go to host memory, or are lost.

When the device runs out of pages, parked rows give theirs up, least urgent first. Pages that go to
host memory are free when the copy is done, in a later step; lost ones are free at once.
"""

from collections.abc import Callable, Collection

from replica.scheduling.growth import Growth
from replica.scheduling.in_flight import InFlight
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.request import Phase, Request
from replica.scheduling.timeline import Event, Timelines


class KeptPages:
    """parked: requests that keep pages, in order of priority, then of when they were parked.

    pages_max: most device pages that they may keep; None for no limit.
    placed: True if a request's adapter is on the device.
    """

    def __init__(
        self,
        pages_max: int | None,
        pages: Pages,
        copies: PageCopies,
        in_flight: InFlight,
        growth: Growth,
        timelines: Timelines,
        placed: Callable[[Request], bool],
    ) -> None:
        self.parked: dict[str, Request] = {}
        self._pages_max = pages_max
        self._pages = pages
        self._copies = copies
        self._in_flight = in_flight
        self._growth = growth
        self._timelines = timelines
        self._placed = placed
        self._owed: dict[int, int] = {}
        self._stalled = 0

    def begin_step(self) -> None:
        self._owed = {}
        self._stalled = 0

    def on_device(self) -> list[Request]:
        """Requests that keep their pages there."""
        return [r for r in self.parked.values() if r.pages and r.copying is None]

    def may_stay(self, rows: Collection[Request]) -> bool:
        """True if these rows, too, may keep their pages on the device."""
        held = sum(len(request.pages) for request in (*self.on_device(), *rows))
        return self._pages_max is None or held <= self._pages_max

    def keep(self, request: Request, leave: bool) -> None:
        """It left the batch. leave: its pages go to host memory (see `PageCopies.can_leave`)."""
        if leave:
            self._leave(request)
        request.become(Phase.PARKED)
        enter(self.parked, request)

    def owed_before(self, request: Request) -> int:
        """Pages for parked rows that may return from host memory and are no less urgent."""
        priority = request.priority
        if priority not in self._owed:
            away = [r for r in self.parked.values() if r.host_pages and self._placed(r)]
            self._owed[priority] = sum(
                self._growth.of(r) + len(r.pages) for r in away if r.priority <= priority
            )
        return self._owed[priority]

    def came_back(self, request: Request, found: int) -> None:
        """It has a row again, and device pages. found: how many of these the prefix cache had."""
        if request.host_pages:
            self._copies.come_back(request, found)
            self._owed = {}

    @property
    def arriving(self) -> int:
        """Pages that copies will free, less one for each row that waits for one of them."""
        return self._copies.arriving - self._stalled

    def wait_for_page(self) -> bool:
        """True if a page arrives for a running row that needs one. Nobody else is promised it."""
        if self.arriving <= 0:
            return False
        self._stalled += 1
        return True

    def last(self, spare: Request | None = None) -> Request | None:
        """The least urgent and newest one that has device pages, but not `spare`."""
        return next((r for r in reversed(self.on_device()) if r is not spare), None)

    def give_up(self, request: Request, now_s: float) -> None:
        """It gives up its device pages."""
        if self._copies.can_leave([request]):
            self._leave(request)
            return
        del self.parked[request.id]
        self.lose(request)
        request.become(Phase.WAITING)
        self._timelines.note(request.id, now_s, Event.PREEMPTED, "pages dropped while parked")

    def free(self, count: int, now_s: float) -> None:
        """Parked rows give up pages if that makes `count` free, at once or in a later step."""
        held = sum(len(request.pages) for request in self.on_device())
        if self._pages.free + self._copies.arriving + held < count:
            return
        while self._pages.free + self._copies.arriving < count:
            last = self.last()
            if last is None:
                return
            self.give_up(last, now_s)

    def send_away(self, count: int) -> bool:
        """Rows whose adapter is away move to host memory, which frees `count` pages in later steps.

        False, and nothing changed, if there are too few such pages, or no space for them.
        """
        away = []
        count -= self.arriving
        for request in reversed(self.on_device()):
            if count <= 0:
                break
            if not self._placed(request):
                away.append(request)
                count -= self._pages.sole(request.pages)
        if count > 0 or not self._copies.can_leave(away):
            return False
        for request in away:
            self._leave(request)
        return True

    def lose(self, request: Request) -> None:
        """It will compute its tokens again."""
        request.lost = max(request.lost, request.computed)
        self.forget(request)
        request.computed = 0

    def forget(self, request: Request) -> None:
        """Give its device pages back."""
        self._in_flight.reuse_pages_of(request)
        self._pages.give_back(request.pages)
        request.pages = []
        request.published = 0

    def check(self) -> None:
        assert self.may_stay(()), "parked rows keep too many pages"

    def _leave(self, request: Request) -> None:
        self._in_flight.reuse_pages_of(request)
        self._copies.leave(request)


def enter(rows: dict[str, Request], request: Request) -> None:
    """Add it, so that the rows stay in order of priority, then of when they came."""
    last = next(reversed(rows.values()), None)
    rows[request.id] = request
    if last is not None and last.priority > request.priority:
        for other in [r for r in rows.values() if r.priority > request.priority]:
            rows[other.id] = rows.pop(other.id)
