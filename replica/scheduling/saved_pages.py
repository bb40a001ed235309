"""Which free pages an admission must leave to others.

- To a request that was passed over: it found no pages, and later ones that needed fewer did. After
  `wait_max_s` the pages that become free are saved for it. Only one request has pages saved, the
  most urgent of those passed over; of equals the one passed over first.
- To an adapter that starves for memory that KV pages hold (`Loads`).

Neither keeps pages from a more urgent request.
"""

import math
from collections.abc import Callable

from replica.scheduling.pages import Pages
from replica.scheduling.request import Request


class SavedPages:
    """request: the one that was passed over.

    wait_max_s: how long it may be passed over before pages are saved for it. None: nothing ever
        passes it.
    """

    def __init__(self, wait_max_s: float | None, pages: Pages) -> None:
        self.wait_max_s = wait_max_s
        self.request: Request | None = None
        self._pages = pages
        self._since_s = 0.0  # when it was passed over first
        self._for_adapter: tuple[int, float, int] = (0, math.inf, 0)

    def begin_step(self, may_run: Callable[[Request], bool]) -> None:
        """may_run: False if pages would not help: its adapter left, or a drain keeps it out."""
        self._for_adapter = (0, math.inf, 0)
        if self.request is not None and not may_run(self.request):
            self.request = None

    def pass_over(self, request: Request, now_s: float) -> None:
        """It found no pages."""
        if self.request is None or request.priority < self.request.priority:
            self.request, self._since_s = request, now_s

    def forget(self, request: Request) -> None:
        """It was admitted, or it ended."""
        if self.request is request:
            self.request = None

    def save_for_adapter(self, count: int, since_s: float, priority: int) -> None:
        """In this step no admission may leave fewer than `count` pages free.

        They are for an adapter that starves since `since_s`. A more urgent request is exempt, and
        one that was passed over since before then.
        """
        self._for_adapter = count, since_s, priority

    def for_request(self, now_s: float) -> int:
        """Pages saved for the request that was passed over."""
        request = self.request
        if request is None or self.wait_max_s is None or now_s - self._since_s <= self.wait_max_s:
            return 0
        return self._pages.needed(request.tokens) - len(request.pages)

    def before(self, since_s: float, now_s: float) -> int:
        """Pages saved for a request that has been passed over since `since_s` or earlier."""
        return self.for_request(now_s) if self._since_s <= since_s else 0

    def from_request(self, request: Request, now_s: float) -> int:
        """Pages that `request` must leave to the one that was passed over."""
        waiter = self.request
        exempt = waiter is None or request is waiter or request.priority < waiter.priority
        return 0 if exempt else self.for_request(now_s)

    def from_request_for_adapter(self, request: Request) -> int:
        """Pages that `request` must leave to an adapter."""
        count, since_s, priority = self._for_adapter
        if request.priority < priority:
            return 0
        return 0 if request is self.request and self._since_s <= since_s else count
