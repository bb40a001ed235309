"""Which bytes of the adapter arena hold which image.

Every image is one contiguous extent. Free bytes may be scattered:

    |AAAA....BBB..CCCCCC....|      10 bytes are free, but no hole fits a 10-byte image
    |AAAABBBCCCCCC..........|      after B and C slid down, one does

An extent that is being copied into cannot move. Extents above it slide down only to its end.
"""

from bisect import bisect_left, insort
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
        self._ordered: list[tuple[int, int, str]] = []  # (offset, size, digest)
        self.used = 0

    def aligned(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    @property
    def free(self) -> int:
        return self.capacity - self.used

    @property
    def end(self) -> int:
        """End of the last image."""
        return sum(self._ordered[-1][:2]) if self._ordered else 0

    def resize(self, capacity: int) -> None:
        assert capacity >= self.end
        self.capacity = capacity - capacity % self.alignment

    def offset(self, digest: str) -> int:
        return self._spans[digest][0]

    def packed(self, gone: Collection[str], immovable: Collection[str]) -> tuple[int, int]:
        """(end of the last image, largest hole below it) after `gone` left and the others slid
        down.
        """
        gone = frozenset(gone)
        going = sorted([self._spans[digest] for digest in gone])
        left = self.used - sum([size for _, size in going])  # that stays and is not passed yet
        end = hole = start = passed = 0
        for span in sorted((*self._spans[d], d) for d in immovable if d not in gone):
            index = bisect_left(self._ordered, span)
            between = sum([size for _, size, _ in self._ordered[start:index]])
            while passed < len(going) and going[passed] < span:
                between -= going[passed][1]
                passed += 1
            hole = max(hole, span[0] - end - between)
            left -= between + span[1]
            end, start = span[0] + span[1], index + 1
        return end + left, hole

    def hole(self, size: int) -> int | None:
        """Offset of the first hole that fits; None if there is none."""
        size = self.aligned(size)
        if size > self.free:
            return None
        end = 0
        for offset, length, _ in self._ordered:
            if offset - end >= size:
                return end
            end = offset + length
        return end if self.capacity - end >= size else None

    def take(self, digest: str, size: int) -> int | None:
        """Offset of the first hole that fits; None, and nothing changed, if there is none."""
        assert digest not in self._spans
        offset = self.hole(size)
        if offset is not None:
            size = self.aligned(size)
            self._spans[digest] = (offset, size)
            insort(self._ordered, (offset, size, digest))
            self.used += size
        return offset

    def give_back(self, digest: str) -> None:
        offset, size = self._spans.pop(digest)
        del self._ordered[bisect_left(self._ordered, (offset, size, digest))]
        self.used -= size

    def slide(self, immovable: Collection[str]) -> list[Shift]:
        """Move every image down as far as it goes. Returns the shifts, in order."""
        shifts = []
        end = 0
        for offset, size, digest in self._ordered:
            if offset > end and digest not in immovable:
                shifts.append(Shift(digest, offset, end, size))
                self._spans[digest] = (end, size)
                offset = end
            end = offset + size
        self._ordered = self._sorted()
        return shifts

    def check(self) -> None:
        end = 0
        for offset, size in sorted(self._spans.values()):
            assert offset >= end and size >= 0, "two images share bytes"
            end = offset + size
        assert end <= self.capacity
        assert self.used == sum(size for _, size in self._spans.values())
        assert self._ordered == self._sorted()

    def _sorted(self) -> list[tuple[int, int, str]]:
        return sorted((*span, digest) for digest, span in self._spans.items())
