"""Which digests the processes of a node need. The kernel keeps the holds, so a process that dies
has none.

A hold is a read lock on one byte of a file, whose number is in the digest's first digits: an open
file description lock (fcntl(2)), of which a process may have any number with one open file.
"""

import contextlib
import fcntl
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
# Digits of the digest that number the byte: as many as an offset can hold. Digests that agree in
# them are held together, which no two will.
_DIGITS = 15


class Holds:
    """Any thread may use it. directory: must exist."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mutex = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._files: dict[str, int] = {}

    def hold(self, digest: str) -> None:
        """Holds are counted."""
        with self._mutex:
            if digest not in self._counts:
                self._lock(digest, fcntl.F_RDLCK)
            self._counts[digest] += 1

    def hold_again(self, digest: str) -> bool:
        """Holds what this process holds already, or returns False."""
        with self._mutex:
            if digest not in self._counts:
                return False
            self._counts[digest] += 1
            return True

    def release(self, digest: str) -> bool:
        """True if this process holds it no more."""
        with self._mutex:
            assert self._counts[digest] > 0, f"{digest} is not held"
            self._counts[digest] -= 1
            if self._counts[digest]:
                return False
            del self._counts[digest]
            if digest[0] in self._files:  # else `close` came first
                self._lock(digest, fcntl.F_UNLCK)
            return True

    def held(self, digest: str) -> bool:
        """True if any process holds it, this one included."""
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _byte(digest), 1, 0)
        # A file of its own: a description's own locks do not conflict with it.
        with _opened(self._path(digest)) as descriptor:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query)
        kind: int = _FLOCK.unpack(answer)[0]
        return kind != fcntl.F_UNLCK

    def close(self) -> None:
        """Ends all holds."""
        with self._mutex:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _lock(self, digest: str, kind: int) -> None:
        if digest[0] not in self._files:
            self._files[digest[0]] = os.open(self._path(digest), os.O_RDWR | os.O_CREAT, 0o666)
        lock = _FLOCK.pack(kind, os.SEEK_SET, _byte(digest), 1, 0)
        fcntl.fcntl(self._files[digest[0]], fcntl.F_OFD_SETLK, lock)

    def _path(self, digest: str) -> Path:
        # Several files, because a lock takes time in proportion to those on its file: 0.6 ms beside
        # 10,000.
        return self._directory / f".held-{digest[0]}"


def _byte(digest: str) -> int:
    return int(digest[:_DIGITS], 16)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
