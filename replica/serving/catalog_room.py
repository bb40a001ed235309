"""Whether one more adapter fits beside those that the catalog has, at the cost of one look."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from cluster.values import Version


class CatalogRoom:
    """Sizes of the catalog's images. Any thread may call it.

    bytes_of: may read the adapter's files. Only `others` calls it.
    """

    def __init__(self, bytes_of: Callable[[Version], int]) -> None:
        self._bytes_of = bytes_of
        self._unread: dict[str, Version | None] = {}
        self._unread_lock = threading.Lock()  # never held while files are read
        self._sizes: dict[str, tuple[int, bool]] = {}  # (bytes, pinned) by digest
        self._images: Counter[tuple[int, bool]] = Counter()
        self._sizes_lock = threading.Lock()

    def update(self, versions: Mapping[str, Version | None]) -> None:
        """versions: by digest; None: the catalog no longer has it."""
        with self._unread_lock:
            self._unread |= versions

    def others(self, digests: Iterable[str]) -> list[tuple[int, bool]]:
        """(bytes, pinned) of all images but these: each that is pinned, and of the rest one a size.

        Blocking: reads the files of what has changed since the last call.
        """
        with self._sizes_lock:
            with self._unread_lock:
                unread, self._unread = self._unread, {}
            for changed, version in unread.items():
                self._replace(changed, version)
            images = self._images.copy()
            for digest in digests:
                if digest in self._sizes:
                    images[self._sizes[digest]] -= 1
        found: list[tuple[int, bool]] = []
        for (size, pinned), count in images.items():
            found += [(size, pinned)] * (count if pinned else min(count, 1))
        return found

    def _replace(self, digest: str, version: Version | None) -> None:
        before = self._sizes.pop(digest, None)
        if before is not None:
            self._images[before] -= 1
            if not self._images[before]:
                del self._images[before]
        if version is not None:
            after = self._sizes[digest] = self._bytes_of(version), version.pinned
            self._images[after] += 1
