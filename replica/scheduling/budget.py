"""One memory for adapter images and KV pages: how far the arena grows, and when it shrinks.

    byte 0            C = first · page_bytes                            total · page_bytes
    |AAAAABBBBB..CCCC.|......|pppppp|...|pppppppppppppp|..|ppppppppppppp|
     the arena         free   KV pages, handed out from this end downwards

The arena is the bytes below C. Page p is the bytes [p · page_bytes, (p + 1) · page_bytes). The
arena grows by whole pages; held pages in its way are copied elsewhere. It shrinks when pages run
out: idle adapters are evicted, images slide down, C falls. Growing leaves `headroom` pages free for
running rows, and shrinking starts only when too few pages are free. So neither undoes the other at
once.

The arena always leaves the pages of one whole context, so that a request alone finds its pages.
"""

from replica.scheduling.adapter import PageMove
from replica.scheduling.extents import Extents
from replica.scheduling.pages import Pages


class Budget:
    """Owns the boundary between `extents` and `pages`.

    context_pages: KV pages of the longest sequence.
    headroom: pages that growing leaves free.
    """

    def __init__(
        self, extents: Extents, pages: Pages, page_bytes: int, context_pages: int, headroom: int
    ) -> None:
        assert extents.capacity == 0 and pages.first == 0, "the arena starts empty"
        self.page_bytes = page_bytes
        self.headroom = min(headroom, context_pages)
        self._extents = extents
        self._pages = pages
        self.total = pages.total
        self._first_max = pages.total - context_pages
        assert self._first_max >= 0, "too few pages for one context"

    @property
    def most_bytes(self) -> int:
        """The largest size the arena can reach."""
        return self._first_max * self.page_bytes

    def limit_bytes(self, reserved: int = 0) -> int:
        """The largest size the arena can reach with the pages that are free now.

        reserved: pages that it leaves free besides the headroom.
        """
        pages = self._pages
        spare = max(pages.free - self.headroom - reserved, 0)
        first = min(pages.first + spare, max(self._first_max, pages.first))
        return first * self.page_bytes

    def free_for(self, end: int, reserved: int) -> int | None:
        """Pages that must be free for the arena to reach byte `end`; None if it never can.

        reserved: as in `limit_bytes`.
        """
        first = -(-end // self.page_bytes)
        if first > self._first_max:
            return None
        return first - self._pages.first + self.headroom + reserved

    def grow(self, end: int) -> tuple[PageMove, ...]:
        """Grow the arena to byte `end`. Returns the pages to copy elsewhere."""
        assert self._extents.capacity < end <= self.limit_bytes()
        first = -(-end // self.page_bytes)
        renamed = self._pages.give_up(first)
        self._extents.resize(first * self.page_bytes)
        return tuple(PageMove(source, target) for source, target in renamed.items())

    def shrink(self, pages: int) -> None:
        """Give back `pages` pages, and up to `headroom` in all if the arena does not use them."""
        first = self._pages.first
        unused = first - -(-self._extents.end // self.page_bytes)
        assert pages <= unused, "an image uses these pages"
        first -= max(pages, min(unused, self.headroom))
        self._pages.get_back(first)
        self._extents.resize(first * self.page_bytes)

    def check(self) -> None:
        capacity = self._pages.first * self.page_bytes
        short = capacity - self._extents.capacity
        assert 0 <= short < self._extents.alignment, "arena and pages overlap or leave a gap"
        assert self._pages.first <= self._first_max, (
            "the arena took pages of the one reserved context"
        )
