"""Which images host memory keeps, to reload without files. Drops the least recently used."""

from collections import OrderedDict


class HostTier:
    """Accounts for bytes only. The engine holds the images."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._dropped: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def fits(self, size: int) -> bool:
        return size <= self.capacity

    def keep(self, digest: str, size: int) -> list[str]:
        """Keep an image as the most recently used. Returns those dropped for it."""
        assert self.fits(size) and digest not in self
        self._sizes[digest] = size
        self._dropped.discard(digest)
        self.used += size
        dropped = []
        while self.used > self.capacity:
            dropped.append(self._drop_oldest())
        return dropped

    def drop_oldest(self) -> str | None:
        return self._drop_oldest() if self._sizes else None

    def _drop_oldest(self) -> str:
        oldest = next(iter(self._sizes))
        self.drop(oldest)
        return oldest

    def touch(self, digest: str) -> None:
        """The image is used, on the device or to load it. It may be none of those kept."""
        if digest in self._sizes:
            self._sizes.move_to_end(digest)

    def drop(self, digest: str) -> None:
        self.used -= self._sizes.pop(digest)
        self._dropped.add(digest)

    def drops(self) -> list[str]:
        """The images dropped since the last call. Their memory must be freed."""
        dropped = sorted(self._dropped)
        self._dropped.clear()
        return dropped

    def check(self) -> None:
        assert self.used == sum(self._sizes.values()) <= self.capacity
