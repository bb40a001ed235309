"""KV pages: who holds which, which are free, and which free ones still hold a known prefix.

    take ──> held ── give_back ──> free, or cached when its tokens were published
              ^                       │
              └── match ──────────────┘   (taken for other tokens when no page is free)

A full page is known by the page before it and its own tokens, the first page by its root: the
adapter's digest, None for the base model. Even an adapter that leaves k and v alone has a root of
its own, for its other projections change what the next layers see. Keys are exact, not hashes of
content, so that two prefixes are never taken for one another.

Pages are handed out highest id first: where adapters share the memory (`budget.py`), the lowest
are theirs, and those next to them are to be free when they want more.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Root = str | None
Key = tuple["Root | int", tuple[int, ...]]


class Prefix(NamedTuple):
    """What was found of a prompt. link: names the last page found, or the root."""

    pages: tuple[int, ...]
    link: Root | int


class Pages:
    """Pages of `page_tokens` tokens each, handed out by id: those from `first` up to `total`."""

    def __init__(self, capacity: int, page_tokens: int, cache: bool = True) -> None:
        assert capacity > 0 and page_tokens > 0
        self.total = capacity
        self.first = 0
        self.page_tokens = page_tokens
        self._cache = cache
        # A heap of negative ids. Those below `first` lie in it too, where nobody comes to them.
        self._free = [-page for page in range(capacity - 1, -1, -1)]
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody, oldest first
        self._holders: dict[int, int] = {}
        self._known: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._links: dict[int, int] = {}
        self._next_link = 0

    @property
    def capacity(self) -> int:
        return self.total - self.first

    @property
    def free(self) -> int:
        """Pages that can be taken; some may hold a prefix that is forgotten then."""
        return len(self._free) - self.first + len(self._unused)

    def needed(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None and nothing changed when there are too few."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if len(self._free) == self.first:
                self._forget(next(iter(self._unused)))
            taken.append(-heapq.heappop(self._free))
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Raises AssertionError, before changing anything, for a page that is not held."""
        pages = list(pages)
        assert len(set(pages)) == len(pages) and all(p in self._holders for p in pages), pages
        # The end of a prefix is of less use than its beginning, and goes first.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._keys:
                self._unused[page] = None
            else:
                heapq.heappush(self._free, -page)

    def give_up(self, first: int) -> dict[int, int]:
        """There are no pages below `first` any more; at least as many must be free.

        Where one of them is held or known, another takes its place: old → new id, for whoever
        holds it and for its content to be copied. Prefixes are forgotten, the oldest first, only
        where too few other pages are free.
        """
        lost = first - self.first
        assert 0 <= lost <= self.free
        while len(self._free) - self.first < lost:
            self._forget(next(iter(self._unused)))
        renamed = {}
        for page in range(self.first, first):
            if page in self._holders or page in self._unused:
                renamed[page] = -heapq.heappop(self._free)
        for page, target in renamed.items():
            self._rename(page, target)
            heapq.heappush(self._free, -page)
        if not renamed.keys().isdisjoint(self._unused):
            order = [renamed.get(page, page) for page in self._unused]
            self._unused = OrderedDict.fromkeys(order)
        self.first = first
        return renamed

    def get_back(self, first: int) -> None:
        """The pages from `first` on are there again, and free."""
        assert 0 <= first <= self.first
        self.first = first

    def may_match(self, root: Root, tokens: Sequence[int]) -> bool:
        """Whether any page is known that `tokens` begin with."""
        return (root, tuple(tokens[: self.page_tokens])) in self._known

    def match(self, root: Root, tokens: Sequence[int], most: int | None = None) -> Prefix:
        """The longest known run of full pages at the beginning of `tokens`; they are held now.

        most: how many of the tokens may be found; None: all.
        """
        link: Root | int = root
        pages: list[int] = []
        end = len(tokens) if most is None else most
        for start in range(0, end - self.page_tokens + 1, self.page_tokens):
            page = self._known.get((link, tuple(tokens[start : start + self.page_tokens])))
            if page is None:
                break
            pages.append(page)
            link = self._links[page]
        for page in pages:
            self._unused.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1
        return Prefix(tuple(pages), link)

    def publish(self, link: Root | int, tokens: Sequence[int], page: int) -> Root | int:
        """A held page was filled with `tokens`, behind `link`. Gives the link of the next one."""
        assert page in self._holders and len(tokens) == self.page_tokens
        if not self._cache:
            return link
        key = (link, tuple(tokens))
        known = self._known.setdefault(key, page)
        if known == page and page not in self._keys:
            self._keys[page] = key
            self._links[page] = self._next_link
            self._next_link += 1
        return self._links[known]

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Every page is free, cached, or held, by exactly those in `holders`."""
        counts: dict[int, int] = {}
        for pages in holders:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        assert counts == self._holders, "pages leaked or used without being taken"
        assert all(n == 1 or page in self._keys for page, n in counts.items()), (
            "a page has two holders though its content is not known"
        )
        free = [-page for page in self._free]
        everywhere = sorted([*free, *self._unused, *counts])
        assert everywhere == list(range(self.total)), "a page is lost or in two places"
        assert min([*self._unused, *counts], default=self.total) >= self.first, (
            "a page was given up"
        )
        assert {page: key for key, page in self._known.items()} == self._keys
        assert self._links.keys() == self._keys.keys()
        assert not self._keys.keys() & set(free)

    def _forget(self, page: int) -> None:
        del self._unused[page]
        del self._known[self._keys.pop(page)]
        del self._links[page]
        heapq.heappush(self._free, -page)

    def _rename(self, page: int, target: int) -> None:
        """Its place in `_unused` is the caller's to change."""
        if page in self._holders:
            self._holders[target] = self._holders.pop(page)
        if page in self._keys:
            key = self._keys[target] = self._keys.pop(page)
            self._known[key] = target
            self._links[target] = self._links.pop(page)
