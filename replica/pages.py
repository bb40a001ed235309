"""KV pages: who holds which, and how many are free."""

from collections.abc import Iterable


class Pages:
    """A fixed number of pages of `page_tokens` tokens each, handed out by id."""

    def __init__(self, capacity: int, page_tokens: int) -> None:
        assert capacity > 0 and page_tokens > 0
        self.capacity = capacity
        self.page_tokens = page_tokens
        self._free = list(range(capacity - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None and nothing changed when there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Raises AssertionError, before changing anything, for a page that is not held."""
        pages = list(pages)
        assert len(set(pages)) == len(pages) and self._held.issuperset(pages), pages
        self._held.difference_update(pages)
        self._free.extend(pages)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Every page is free or held by exactly one of `holders`."""
        held = [page for pages in holders for page in pages]
        assert len(held) == len(set(held)), "a page has two holders"
        assert set(held) == self._held, "pages leaked or used without being taken"
        assert sorted([*self._free, *held]) == list(range(self.capacity))
