"""One memory for adapter images and KV pages: how far the arena may grow, and what it gives back.

    byte 0            C = first · page_bytes                            total · page_bytes
    |AAAAABBBBB..CCCC.|......|pppppp|...|pppppppppppppp|..|ppppppppppppp|
     the arena         free   KV pages, handed out from this end downwards

The arena is the bytes below C, page p the bytes [p · page_bytes, (p + 1) · page_bytes). The arena
grows by whole pages; those that are held where it grows are copied elsewhere. It shrinks when pages
run short: idle adapters leave, images slide down, C falls. Growing leaves `headroom` pages free for
rows that run, shrinking waits until none is free: so neither undoes the other at once.

The arena never takes the pages of one whole context, so that a request alone always finds them.
"""

from replica.scheduling.adapter import PageMove
from replica.scheduling.extents import Extents
from replica.scheduling.pages import Pages


class Budget:
    """Owns where `extents` end and `pages` begin.

    context_pages: of the longest sequence. headroom: pages that growing leaves free.
    reserved: pages that it leaves besides, for a request that waits for them.
    """

    def __init__(
        self, extents: Extents, pages: Pages, page_bytes: int, context_pages: int, headroom: int
    ) -> None:
        assert extents.capacity == 0 and pages.first == 0, "the arena begins with nothing"
        self.page_bytes = page_bytes
        self.headroom = min(headroom, context_pages)
        self.reserved = 0
        self._extents = extents
        self._pages = pages
        self.total = pages.total
        self._first_max = pages.total - context_pages
        assert self._first_max >= 0, "there is no room for one context"

    @property
    def most_bytes(self) -> int:
        """What the arena can ever be."""
        return self._first_max * self.page_bytes

    @property
    def limit_bytes(self) -> int:
        """What the arena may be now."""
        pages = self._pages
        spare = max(pages.free - self.headroom - self.reserved, 0)
        first = min(pages.first + spare, max(self._first_max, pages.first))
        return first * self.page_bytes

    def free_for(self, end: int) -> int | None:
        """Pages that must be free for the arena to reach up to byte `end`; None if it never may."""
        first = -(-end // self.page_bytes)
        if first > self._first_max:
            return None
        return first - self._pages.first + self.headroom + self.reserved

    def grow(self, end: int) -> tuple[PageMove, ...]:
        """The arena reaches up to byte `end`. Gives the pages that are to be copied elsewhere."""
        assert self._extents.capacity < end <= self.limit_bytes
        first = -(-end // self.page_bytes)
        renamed = self._pages.give_up(first)
        self._extents.resize(first * self.page_bytes)
        return tuple(PageMove(source, target) for source, target in renamed.items())

    def shrink(self, pages: int) -> None:
        """Give back that many pages, and up to `headroom` where the arena has no use for them."""
        first = self._pages.first
        unused = first - -(-self._extents.end // self.page_bytes)
        assert pages <= unused, "an image lies there"
        first -= max(pages, min(unused, self.headroom))
        self._pages.get_back(first)
        self._extents.resize(first * self.page_bytes)

    def check(self) -> None:
        capacity = self._pages.first * self.page_bytes
        short = capacity - self._extents.capacity
        assert 0 <= short < self._extents.alignment, "bytes belong to both, or to nobody"
        assert self._pages.first <= self._first_max, "no request is sure of its pages"
