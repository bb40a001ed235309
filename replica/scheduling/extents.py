"""Which bytes of the adapter arena hold which image.

Every image is one contiguous extent. Free bytes may be scattered:

    |AAAA....BBB..CCCCCC....|      10 bytes are free, but no hole fits a 10-byte image
    |AAAABBBCCCCCC..........|      after B and C slid down, one does

An extent that is being copied into cannot move. Extents above it slide down only to its end.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shift:
    """Move the image of `digest` down from byte `source` to byte `target`."""

    digest: str
    source: int
    target: int
    bytes: int


class Extents:
    """Offsets and sizes are in bytes, multiples of `alignment`."""

    def __init__(self, capacity: int, alignment: int = 256) -> None:
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        self._spans: dict[str, tuple[int, int]] = {}
        self._ordered: list[tuple[int, int, str]] | None = None
        self.used = 0

    def aligned(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    @property
    def free(self) -> int:
        return self.capacity - self.used

    @property
    def end(self) -> int:
        """End of the last image."""
        return max((offset + size for offset, size in self._spans.values()), default=0)

    def resize(self, capacity: int) -> None:
        assert capacity >= self.end
        self.capacity = capacity - capacity % self.alignment

    def offset(self, digest: str) -> int:
        return self._spans[digest][0]

    def copy(self) -> "Extents":
        clone = Extents(self.capacity, self.alignment)
        clone._spans, clone.used = dict(self._spans), self.used
        return clone

    def packed(self, gone: Collection[str], immovable: Collection[str]) -> tuple[int, int]:
        """(end of the last image, largest hole below it) after `gone` left and the others slid
        down.
        """
        gone = frozenset(gone)
        end = hole = 0
        for offset, size, digest in self._in_order():
            if digest in gone:
                continue
            if digest in immovable:
                hole = max(hole, offset - end)
                end = offset
            end += size
        return end, hole

    def take(self, digest: str, size: int) -> int | None:
        """Offset of the first hole that fits; None, and nothing changed, if there is none."""
        assert digest not in self._spans
        size = self.aligned(size)
        end = 0
        for offset, length, _ in self._in_order():
            if offset - end >= size:
                break
            end = offset + length
        if self.capacity - end < size:
            return None
        self._spans[digest] = (end, size)
        self._ordered = None
        self.used += size
        return end

    def give_back(self, digest: str) -> None:
        self.used -= self._spans.pop(digest)[1]
        self._ordered = None

    def slide(self, immovable: Collection[str]) -> list[Shift]:
        """Move every image down as far as it goes. Returns the shifts, in order."""
        shifts = []
        end = 0
        for offset, size, digest in self._in_order():
            if offset > end and digest not in immovable:
                shifts.append(Shift(digest, offset, end, size))
                self._spans[digest] = (end, size)
                offset = end
            end = offset + size
        self._ordered = None
        return shifts

    def _in_order(self) -> list[tuple[int, int, str]]:
        """(offset, size, digest) by rising offset."""
        if self._ordered is None:
            self._ordered = sorted((*span, digest) for digest, span in self._spans.items())
        return self._ordered

    def check(self) -> None:
        end = 0
        for offset, size in sorted(self._spans.values()):
            assert offset >= end and size >= 0, "two images share bytes"
            end = offset + size
        assert end <= self.capacity
        assert self.used == sum(size for _, size in self._spans.values())
