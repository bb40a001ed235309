"""KV pages: who holds which, which are free, and which free ones still hold a known prefix.

    take ──> held ── give_back ──> free, or cached if its tokens were published
              ^                       │
              └── match ──────────────┘   (reused for other tokens when no page is free)

A full page is identified by the page before it and its own tokens, a first page by its root: the
adapter's digest, or None for the base model, with the request's salt if it has one. An adapter that
leaves k and v unchanged still has its own root, because its other projections change the input of
later layers. Keys are exact instead of content hashes, so that two prefixes are never confused.

Pages are handed out by falling id. If adapters share the memory (`budget.py`), they have the lowest
pages, and the ones next to these should be free when the arena grows.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Root = str | tuple[str | None, str] | None
Mark = tuple[str, int]
Key = tuple["Root | int | tuple[Root | int, Mark]", tuple[int, ...]]


class Fork(NamedTuple):
    """Where a request leaves the pages of the base model: the key of page `page` has `mark` too, so
    it and all that follow are its adapter's. mark: digest, and the first token of the adapter.
    """

    page: int
    mark: Mark


class Prefix(NamedTuple):
    """The cached prefix of a prompt.

    links: identify its pages. link: the last of these, or the root.
    """

    pages: tuple[int, ...]
    links: tuple[int, ...]
    link: Root | int


class PageCopy(NamedTuple):
    """Copy device pages to host pages if `out`, else back. number: names it until it is done."""

    number: int
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    out: bool


class Pages:
    """Pages of `page_tokens` tokens, with ids from `first` up to, but not including, `total`."""

    def __init__(self, capacity: int, page_tokens: int, cache: bool = True) -> None:
        assert capacity > 0 and page_tokens > 0
        self.total = capacity
        self.first = 0
        self.page_tokens = page_tokens
        self.caches = cache
        # A heap of negative ids. It also has those below `first`, which are never popped.
        self._free = [-page for page in range(capacity - 1, -1, -1)]
        self._unused: OrderedDict[int, None] = (
            OrderedDict()
        )  # cached without a holder, oldest first
        self._known: dict[Key, int] = {}
        self._next_link = 0
        # By page: how many hold it; its key and link, or None and -1 if it is not published.
        self._holders = [0] * capacity
        self._keys: list[Key | None] = [None] * capacity
        self._links = [-1] * capacity

    @property
    def capacity(self) -> int:
        return self.total - self.first

    @property
    def free(self) -> int:
        """Pages that can be taken. Some may hold a cached prefix, which is then forgotten."""
        return len(self._free) - self.first + len(self._unused)

    def needed(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def sole(self, pages: Iterable[int]) -> int:
        """How many of these held pages have one holder."""
        return sum(self._holders[page] == 1 for page in pages)

    def take(self, count: int) -> list[int] | None:
        """`count` pages; None, and nothing changed, if there are too few."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if len(self._free) > self.first:
                page = -heapq.heappop(self._free)
            else:
                page = self._forget_oldest()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Raises AssertionError for a page that is not held, and then changes nothing."""
        pages = list(pages)
        assert len(set(pages)) == len(pages) and all(self._holders[page] for page in pages), pages
        # The end of a prefix is less useful than its beginning, so it is forgotten first.
        holders, keys, unused = self._holders, self._keys, self._unused
        for page in reversed(pages):
            holders[page] -= 1
            if holders[page]:
                continue
            if keys[page] is not None:
                unused[page] = None
            else:
                heapq.heappush(self._free, -page)

    def give_up(self, first: int) -> dict[int, int]:
        """Give all pages below `first` to the arena. At least as many must be free.

        Returns old → new id for each of them that is held or cached; the caller copies the contents
        and renames the pages of their holders. Prefixes are forgotten, oldest first, only if too
        few other pages are free.
        """
        lost = first - self.first
        assert 0 <= lost <= self.free
        while len(self._free) - self.first < lost:
            heapq.heappush(self._free, -self._forget_oldest())
        renamed = {}
        for page in range(self.first, first):
            if self._holders[page] or page in self._unused:
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
        """The pages from `first` on exist again, and are free."""
        assert 0 <= first <= self.first
        self.first = first

    def may_match(self, root: Root, tokens: Sequence[int], fork: Fork | None = None) -> bool:
        """True if the first page of `tokens` is cached."""
        return _key(root, tokens[: self.page_tokens], 0, fork) in self._known

    def match(
        self,
        root: Root,
        tokens: Sequence[int],
        most: int | None = None,
        fork: Fork | None = None,
    ) -> Prefix:
        """The longest cached run of full pages at the start of `tokens`. They are now held.

        most: how many of the tokens may be matched; None for all.
        """
        link: Root | int = root
        pages: list[int] = []
        links: list[int] = []
        end = len(tokens) if most is None else most
        for start in range(0, end - self.page_tokens + 1, self.page_tokens):
            following = tokens[start : start + self.page_tokens]
            page = self._known.get(_key(link, following, len(pages), fork))
            if page is None:
                break
            pages.append(page)
            link = self._links[page]
            links.append(link)
        for page in pages:
            self._unused.pop(page, None)
            self._holders[page] += 1
        return Prefix(tuple(pages), tuple(links), link)

    def still_longest(
        self, prefix: Prefix, following: Sequence[int], fork: Fork | None = None
    ) -> bool:
        """True if an earlier match is still what `match` would find. Takes a tenth of its time.

        following: tokens of the first page after it; empty if that may not be matched.
        """
        if prefix.links != tuple(map(self._links.__getitem__, prefix.pages)):
            return False
        key = _key(prefix.link, following, len(prefix.pages), fork)
        return not following or key not in self._known

    def unheld(self, prefix: Prefix) -> int:
        """How many of its pages are free."""
        return sum(page in self._unused for page in prefix.pages)

    def touch(self, prefix: Prefix) -> None:
        """As if its pages had been matched and given back: others are forgotten before them."""
        for page in reversed(prefix.pages):
            if page in self._unused:
                self._unused.move_to_end(page)

    def publish(
        self,
        link: Root | int,
        tokens: Sequence[int],
        page: int,
        index: int = 0,
        fork: Fork | None = None,
    ) -> Root | int:
        """A held page was filled with `tokens`, after `link`. Returns the link of the next page.

        index: of the page among those of the request that `fork` is of.
        """
        assert self._holders[page] and len(tokens) == self.page_tokens
        if not self.caches:
            return link
        key = _key(link, tokens, index, fork)
        known = self._known.setdefault(key, page)
        if known == page and self._keys[page] is None:
            self._keys[page] = key
            self._links[page] = self._next_link
            self._next_link += 1
        return self._links[known]

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Every page is free, cached, or held by exactly those in `holders`."""
        counts: dict[int, int] = {}
        for pages in holders:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        held = {page: count for page, count in enumerate(self._holders) if count}
        assert counts == held, "pages leaked, or are used without being taken"
        assert all(n == 1 or self._keys[page] is not None for page, n in counts.items()), (
            "an unpublished page has two holders"
        )
        free = [-page for page in self._free]
        everywhere = sorted([*free, *self._unused, *counts])
        assert everywhere == list(range(self.total)), "a page is lost or counted twice"
        assert min([*self._unused, *counts], default=self.total) >= self.first, (
            "a page that was given up is in use"
        )
        published = {page: key for page, key in enumerate(self._keys) if key is not None}
        assert {page: key for key, page in self._known.items()} == published
        assert {page for page, link in enumerate(self._links) if link >= 0} == published.keys()
        assert not published.keys() & set(free)

    def _forget_oldest(self) -> int:
        """The page whose prefix is forgotten."""
        page, _ = self._unused.popitem(last=False)
        key = self._keys[page]
        assert key is not None
        del self._known[key]
        self._keys[page], self._links[page] = None, -1
        return page

    def _rename(self, page: int, target: int) -> None:
        """The caller updates its position in `_unused`."""
        self._holders[target], self._holders[page] = self._holders[page], 0
        key = self._keys[target] = self._keys[page]
        self._links[target] = self._links[page]
        if key is not None:
            self._known[key] = target
            self._keys[page], self._links[page] = None, -1


def _key(link: Root | int, tokens: Sequence[int], index: int, fork: Fork | None) -> Key:
    """Of a request's page number `index`."""
    if fork is not None and index == fork.page:
        return (link, fork.mark), tuple(tokens)
    return link, tuple(tokens)
