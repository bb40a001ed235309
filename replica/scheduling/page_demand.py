"""How many KV pages requests will need, and whether there are so many."""

from collections.abc import Mapping

from replica.scheduling.growth import Growth
from replica.scheduling.in_flight import InFlight
from replica.scheduling.kept_pages import KeptPages
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.request import Request
from replica.scheduling.waiting import Waiting

# `Growth.peak` may estimate so many pages more than a row can need.
_ROUNDING = 2


class PageDemand:
    """running: rows of the batch. in_flight: has the ended requests that still hold pages."""

    def __init__(
        self,
        pages: Pages,
        copies: PageCopies,
        growth: Growth,
        kept: KeptPages,
        waiting: Waiting,
        running: Mapping[str, Request],
        in_flight: InFlight,
    ) -> None:
        self._pages = pages
        self._copies = copies
        self._growth = growth
        self._kept = kept
        self._waiting = waiting
        self._running = running
        self._in_flight = in_flight
        self._most = 0  # `_most_of` all running rows
        self._peak: int | None = None  # as of this step
        self._suffice: bool | None = None

    def begin_step(self) -> None:
        self._peak = self._suffice = None

    def parked(self) -> None:
        """Rows left the batch, or their pages the device."""
        self._peak = None

    def entered(self, request: Request) -> None:
        """It has a row."""
        self._most += self._most_of(request)

    def left(self, request: Request) -> None:
        """It has no row any more."""
        self._most -= self._most_of(request)

    def fits_whole(self, request: Request, spare: int) -> bool:
        """True if it and all rows fit even if each grows to its very end, and `spare` more pages.

        Then nothing must be left free for growth, which takes no look at each row. False while rows
        are parked, as if they did not fit.
        """
        if self._kept.parked:
            return False
        most = self._most + self._most_of(request) + self._ended
        return most + spare <= self._pages.capacity

    def admitted(self, request: Request) -> None:
        """It has pages for a row."""
        if self._peak is not None:
            self._peak += max(self._growth.of(request), 0)

    @property
    def peak(self) -> int:
        """Pages that running and parked rows will need beyond those they hold on the device."""
        if self._peak is None:
            self._peak = self._growth.peak(self._running.values(), self._kept.on_device())
        return self._peak

    def beside(self, request: Request) -> int:
        """Pages that its admission leaves free for the growth of others.

        A row that returns only needs them for a while: if they run out, it leaves again.
        """
        if not request.host_pages:
            return self.peak
        each = self._pages.needed(self._copies.tokens_between(request))
        return each * (len(self._running) + 1)

    @property
    def met(self) -> bool:
        """True if there are pages for all waiting requests, beside what the others will need.

        Rows that take turns may keep as many pages in host memory as the device has. With more of
        them begun, all would end later, and hardly one in time.
        """
        if self._suffice is None:
            self._suffice = self._is_met()
        return self._suffice

    def check(self) -> None:
        running = self._running.values()
        assert self._most == sum(map(self._most_of, running))
        if not self._kept.parked and self._most + self._ended <= self._pages.capacity:
            assert self._growth.peak(running, ()) <= self._pages.free, "not all rows fit"

    @property
    def _ended(self) -> int:
        """Pages that ended requests still hold."""
        return sum(len(request.pages) for request in self._in_flight.deferred_free)

    def _most_of(self, request: Request) -> int:
        """Pages at its very end."""
        return self._pages.needed(request.tokens_max) + _ROUNDING

    def _is_met(self) -> bool:
        waiting, left = self._waiting, self._pages.free
        host = self._copies.host
        if host is not None:
            left += min(host.free, self._pages.capacity - (host.capacity - host.free))
        # First what takes no look at each request: at least their prompts, at most their bounds.
        begun = sum(len(request.prompt) for request in self._kept.parked.values())
        if waiting.prompt_tokens - begun > left * self._pages.page_tokens:
            return False
        left -= self.peak
        if self._pages.needed(waiting.tokens_max) + len(waiting) <= left:
            return True
        for request in waiting:
            if left < 0:
                break
            if not request.pages or request.copying:
                left -= self._growth.of(request)
        return left >= 0
