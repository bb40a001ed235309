"""A device's memory, byte by byte: which plans write where, and what they overwrite.

Images and pages have separate ranges, or share one (`replica/scheduling/budget.py`).
"""

import dataclasses
from collections.abc import Sequence

from replica.scheduling.adapter import ArenaChange, Evict, Load, PageMove
from replica.scheduling.pages import PageCopy
from replica.scheduling.plan import Work
from replica.scheduling.scheduler import Scheduler

_Written = tuple[str | None, int]  # (adapter that computed it, token)
_Contents = dict[int, _Written]  # of a page, by position in it


class Memory:
    """Carries out a scheduler's plans. Raises AssertionError if live content is overwritten."""

    def __init__(self, core: Scheduler) -> None:
        self._extents, self._pages = core.adapter_cache.extents, core.pages
        budget = core.adapter_cache.budget
        self._pages_begin = self._extents.capacity if budget is None else 0
        self._page_bytes = 1 if budget is None else budget.page_bytes
        end = self._pages_begin + self._pages.total * self._page_bytes
        self._owners: list[object] = [None] * end
        self._images: dict[int, Load] = {}
        self._tokens: dict[tuple[int, int], _Written] = {}
        self.copies: list[Load] = []
        self.page_copies: dict[int, PageCopy] = {}
        self._host: dict[int, _Contents] = {}
        self.lost: set[int] = set()  # slots whose load failed after later changes were planned

    @property
    def slots(self) -> set[int]:
        return set(self._images)

    def make(self, change: ArenaChange) -> None:
        """Apply all but the load, which `begin` starts."""
        for evict in change.evictions:
            self.clear(evict)
        for move in change.slides:
            if move.slot in self.lost:
                continue
            assert move.slot in self._images, "an absent image cannot move"
            image = self._image(move.slot)
            assert (image.offset, image.bytes) == (move.source, move.bytes)
            self._images[move.slot] = dataclasses.replace(image, offset=move.target)
            self._own(move.target, move.bytes, image.digest)
        moved = {page.source for page in change.page_moves}
        for copy in list(self.page_copies.values()):
            if not moved.isdisjoint(copy.pages):
                self._finish(copy)
        for page in change.page_moves:
            self._move_page(page)

    def clear(self, evict: Evict) -> None:
        """If its load was lost, the slot may be empty."""
        image = self._images.pop(evict.slot, None)
        assert image is None or image.digest == evict.digest

    def begin(self, load: Load) -> None:
        assert load.slot not in self._images
        self.lost.discard(load.slot)
        self.copies.append(load)
        self._own(load.offset, load.bytes, load.digest)

    def end(self, load: Load, good: bool) -> None:
        """Up to now the copy may have written at any time."""
        self.copies.remove(load)
        self._own(load.offset, load.bytes, load.digest if good else "broken")
        if good:
            self._images[load.slot] = load

    def begin_copy(self, copy: PageCopy) -> None:
        """The copy reads and writes at any time until it ends."""
        assert len(copy.pages) == len(copy.host_pages) > 0
        self.page_copies[copy.number] = copy

    def end_copy(self, number: int) -> None:
        """Raises AssertionError if a page of it was in another's use since it began."""
        if number in self.page_copies:
            self._finish(self.page_copies[number])

    def _finish(self, copy: PageCopy) -> None:
        del self.page_copies[copy.number]
        for page, host_page in zip(copy.pages, copy.host_pages, strict=True):
            if copy.out:
                self._host[host_page] = self._contents(page)
            else:
                for offset in range(self._pages.page_tokens):
                    self._tokens.pop((page, offset), None)
                self._own(*self._span(page), page)
                for offset, written in self._host[host_page].items():
                    self._tokens[page, offset] = written

    def _contents(self, page: int) -> _Contents:
        found = ((offset, self.read(page, offset)) for offset in range(self._pages.page_tokens))
        return {offset: written for offset, written in found if written is not None}

    def weights(self, slot: int) -> str | None:
        """The adapter whose weights the rows of this slot use."""
        return self._image(slot).digest if slot else None

    def compute(self, work: Work, pages: Sequence[int]) -> None:
        """The row must attend to its own tokens, computed with its own weights."""
        request, size = work.request, self._pages.page_tokens
        for position, token in enumerate(request.slice(0, work.end)):
            page, offset = pages[position // size], position % size
            written = request.digest, token
            if position >= work.start:
                self.write(page, offset, written)
            assert self.read(page, offset) == written, f"{request.id} at {position}"

    def span(self, slot: int) -> tuple[int, int]:
        """The bytes [begin, end) of the slot's image."""
        image = self._image(slot)
        return image.offset, image.offset + image.bytes

    def write(self, page: int, offset: int, written: _Written) -> None:
        self._own(*self._span(page), page)
        self._tokens[page, offset] = written

    def read(self, page: int, offset: int) -> _Written | None:
        start, size = self._span(page)
        whole = self._owners[start : start + size] == [page] * size
        return self._tokens.get((page, offset)) if whole else None

    def check(self) -> None:
        """Every image is whole."""
        for slot in self._images:
            self._image(slot)

    def _image(self, slot: int) -> Load:
        image = self._images[slot]
        bytes = self._owners[image.offset : image.offset + image.bytes]
        assert bytes == [image.digest] * image.bytes, f"{image.digest} was overwritten"
        return image

    def _own(self, start: int, size: int, owner: object) -> None:
        self._owners[start : start + size] = [owner] * size

    def _span(self, page: int) -> tuple[int, int]:
        return self._pages_begin + page * self._page_bytes, self._page_bytes

    def _move_page(self, move: PageMove) -> None:
        contents = self._contents(move.source)
        for offset in range(self._pages.page_tokens):
            self._tokens.pop((move.target, offset), None)
        for offset, written in contents.items():
            self._tokens[move.target, offset] = written
        self._own(*self._span(move.target), move.target)
