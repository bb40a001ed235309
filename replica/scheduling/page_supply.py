"""Where KV pages come from: free ones, then memory of idle adapters, then parked rows."""

import math
from collections.abc import Collection

from replica.scheduling.adapter import ArenaChange
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.kept_pages import KeptPages
from replica.scheduling.pages import Pages
from replica.scheduling.request import Request


class PageSupply:
    """running: rows of the batch, by priority."""

    def __init__(
        self,
        pages: Pages,
        adapter_cache: AdapterCache,
        kept: KeptPages,
        running: dict[str, Request],
    ) -> None:
        self._pages = pages
        self._adapter_cache = adapter_cache
        self._kept = kept
        self._running = running
        self._arena_changes: list[ArenaChange] = []
        self._draining: Collection[str] = ()
        self._evictable: int | None = None  # pages that idle adapters would yield, as of this step
        # In this step idle adapters cannot yield this many pages, nor more.
        self._unattainable = math.inf

    def begin_step(self, draining: Collection[str]) -> None:
        """draining: adapters whose place is reserved."""
        self._draining = draining
        self._evictable, self._unattainable = None, math.inf

    def take_changes(self) -> list[ArenaChange]:
        """The changes that made pages since the last call, in order."""
        changes, self._arena_changes = self._arena_changes, []
        return changes

    @property
    def exhausted(self) -> bool:
        """True if idle adapters yield no page in this step."""
        return self._adapter_cache.budget is None or self._unattainable <= 1

    def may_yield(self, count: int) -> bool:
        """True if idle adapters may yield so many pages in this step."""
        if self._evictable is None:
            self._evictable = self._adapter_cache.victim_search.evictable_pages()
        return count < self._unattainable and count <= self._evictable

    def make(self, count: int, now_s: float, wanted: bool, requester: Request | None) -> bool:
        """Let idle adapters leave for `count` pages, but not the requester's.

        wanted: also adapters that requests wait for. False, and nothing changed, if they are too
        few.
        """
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

    def take(
        self, count: int, now_s: float, drop: bool, requester: Request | None = None
    ) -> list[int] | None:
        """Take pages. Idle adapters may have to leave for them, but not the requester's.

        drop: adapters that requests wait for may also leave, and then parked rows other than
            `requester` give up their pages. Pages that go to host memory are free in a later step.
        """
        while (pages := self._pages.take(count)) is None:
            if self.make(count - self._pages.free, now_s, drop, requester):
                continue
            if not drop or self._pages.free + self._kept.arriving >= count:
                return None
            newest = self._kept.last(spare=requester)
            if newest is None or self._others_first(newest):
                return None
            self._kept.give_up(newest, now_s)
        return pages

    def _others_first(self, parked: Request) -> bool:
        """True if a running row is less urgent, and others go on when it loses its pages."""
        running = self._running
        return len(running) > 1 and next(reversed(running.values())).priority > parked.priority
