"""Which bytes of the adapter arena belong to whom.

Every image is one contiguous extent. Free bytes may be scattered:

    |AAAA....BBB..CCCCCC....|      a 10-byte image fits no hole, though 10 bytes are free
    |AAAABBBCCCCCC..........|      after B and C slid down it does

An extent that is being copied into cannot move; those behind it slide only up to its end.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slide:
    """Move the image of `digest` from byte `source` down to byte `target`."""

    digest: str
    source: int
    target: int
    bytes: int


class Extents:
    """Offsets and sizes in bytes, multiples of `alignment`."""

    def __init__(self, capacity: int, alignment: int = 256) -> None:
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        self._spans: dict[str, tuple[int, int]] = {}

    def aligned(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    @property
    def used(self) -> int:
        return sum(size for _, size in self._spans.values())

    @property
    def free(self) -> int:
        return self.capacity - self.used

    @property
    def end(self) -> int:
        """Of the last image: nothing lies behind it."""
        return max((offset + size for offset, size in self._spans.values()), default=0)

    def resize(self, capacity: int) -> None:
        assert capacity >= self.end
        self.capacity = capacity - capacity % self.alignment

    def offset(self, digest: str) -> int:
        return self._spans[digest][0]

    def copy(self) -> "Extents":
        twin = Extents(self.capacity, self.alignment)
        twin._spans = dict(self._spans)
        return twin

    def take(self, digest: str, size: int) -> int | None:
        """The offset of the first hole that fits, or None and nothing changed."""
        assert digest not in self._spans
        size = self.aligned(size)
        end = 0
        for offset, length in sorted(self._spans.values()):
            if offset - end >= size:
                break
            end = offset + length
        if self.capacity - end < size:
            return None
        self._spans[digest] = (end, size)
        return end

    def give_back(self, digest: str) -> None:
        del self._spans[digest]

    def slide(self, immovable: Collection[str]) -> list[Slide]:
        """Move everything down as far as it goes. The moves are in the order to carry them out."""
        slides = []
        end = 0
        for digest, (offset, size) in sorted(self._spans.items(), key=lambda item: item[1]):
            if offset > end and digest not in immovable:
                slides.append(Slide(digest, offset, end, size))
                self._spans[digest] = (end, size)
                offset = end
            end = offset + size
        return slides

    def check(self) -> None:
        end = 0
        for offset, size in sorted(self._spans.values()):
            assert offset >= end and size >= 0, "two images share bytes"
            end = offset + size
        assert end <= self.capacity
        assert self.free + sum(size for _, size in self._spans.values()) == self.capacity
