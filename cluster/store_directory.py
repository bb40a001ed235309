"""The directory of a store: the versions in it, what is on its way in, and the room that they take.

DIGEST/       the files of one version: complete, read-only, never changed
.incoming-*/  what is being copied, received or deleted; a crash leaves it for `_sweep`
.partial-*/   what is there of a URL (`downloads.py`)
.unchecked-*/ versions kept before the machine last started: their data may not have reached
              the disk, so they are inspected once before they are used
.boot         id of the machine's start
.held-*       which versions the processes need (`holds.py`)
.lock         locked during each change of the above; the bytes of all versions, or more
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.downloads import sweep
from cluster.errors import StoreFull
from cluster.holds import Holds

_INCOMING = ".incoming-"
_UNCHECKED = ".unchecked-"
DIGEST = re.compile("[0-9a-f]{64}")
_KEPT = re.compile(rf"({re.escape(_UNCHECKED)})?{DIGEST.pattern}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SUM_BYTES = 20


class StoreDirectory:
    """Blocking. Any thread, and all processes of a node, may use it.

    A version is held until `release` or the end of the process. One that no process holds stays
    until room is needed. Those that were held last stay longest.

    capacity: bytes of all versions. None: half of the directory's file system.
    """

    def __init__(self, directory: str, capacity: int | None) -> None:
        self._directory = os.path.abspath(directory)
        self.capacity = 0 if capacity is None else capacity  # known when a file has come in
        self._sized = capacity is not None
        self._opening = threading.Lock()
        self._opened: Holds | None = None

    def __str__(self) -> str:
        return self._directory

    def path(self, digest: str) -> str:
        """Where the files of a version are while it is held."""
        return f"{self._directory}/{digest}"

    def unchecked(self, digest: str) -> str:
        return self.path(_UNCHECKED + digest)

    @contextlib.contextmanager
    def disk(self, uri: str) -> Iterator[None]:
        """Turns an error of the store's own disk into StoreFull."""
        try:
            yield
        except OSError as error:
            raise StoreFull(f"{uri}: the store {self._directory} failed: {error}") from error

    @contextlib.contextmanager
    def incoming(self, uri: str) -> Iterator[str]:
        """A new directory, which is deleted at the end unless it was renamed."""
        with self.disk(uri), contextlib.ExitStack() as stack:
            self._open()
            with self._locked():
                new = self._unused_name()
                os.mkdir(new)
                # Tells `_sweep` in other processes that this one lives.
                descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                stack.callback(shutil.rmtree, new, ignore_errors=True)
                with contextlib.suppress(OSError):  # NFS locks no directories, also not in `_sweep`
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield new

    def keep(self, uri: str, new: str, digest: str) -> None:
        """Moves the files to their place, and holds them. Raises StoreFull, or OSError."""
        target, size = self.path(digest), _size(new)
        retired: list[str] = []
        with self._locked() as lock:
            if os.path.isdir(target) and _size(target) != size:
                retired.append(self._retire(digest))  # someone damaged it
            if not os.path.isdir(target):
                used = self._used(lock)
                if used + size > self.capacity:
                    used, victims = self._make_room(uri, size)
                    retired += victims
                # Before the rename: a crash between the two leaves a sum that is too large, which
                # `_make_room` corrects.
                _set_used(lock, used + size)
                os.rename(new, target)
            self._holds.hold(digest)
        _delete(retired)

    def hold_present(self, uri: str, digest: str) -> bool:
        """Holds the version if its files are here."""
        with self.disk(uri):
            self._open()
            with self._locked():
                present = os.path.isdir(self.path(digest))
                if present:
                    self._holds.hold(digest)
                    os.utime(self.path(digest))
                return present

    def hold_again(self, digest: str) -> bool:
        """Holds a version that this process holds already; False if it does not. Does no I/O."""
        return self._opened is not None and self._opened.hold_again(digest)

    def release(self, digest: str) -> None:
        """Ends one hold."""
        if self._opened is not None and self._opened.release(digest):
            with contextlib.suppress(OSError):  # someone deleted it by hand
                os.utime(self.path(digest))

    def close(self) -> None:
        """Ends all holds."""
        if self._opened is not None:
            self._opened.close()

    def believe(self, digest: str) -> None:
        """Its files were inspected since the machine started. Raises OSError if they are gone."""
        with self._locked():
            os.rename(self.unchecked(digest), self.path(digest))

    def drop(self, digest: str) -> None:
        """Deletes a version's files, though it may be held. Raises OSError if they are gone."""
        with self._locked():
            retired = self._retire(digest)
        _delete([retired])

    def drop_idle(self, only: str | None = None) -> bool:
        """Drops all versions, or this one, that no process holds. False if there are none."""
        with self._locked() as lock:
            versions = self._versions()
            known = [name for name, _ in versions if only in (None, name)]
            idle = [name for name in known if not self._in_use(name)]
            retired = [self._retire(name) for name in idle]
            _set_used(lock, sum(bytes for name, bytes in versions if name not in idle))
        _delete(retired)
        return bool(retired)

    def left(self) -> int:
        """Bytes that the versions in use leave."""
        with self._locked():
            used = sum(bytes for name, bytes in self._versions() if self._in_use(name))
        return max(self.capacity - used, 0)

    def full(self, uri: str, size: int, used: int) -> StoreFull:
        return StoreFull(
            f"{uri}: takes {size} bytes, but adapters in use take {used} of the {self.capacity} "
            f"bytes of the store {self._directory} (adapter_disk)"
        )

    @property
    def _holds(self) -> Holds:
        assert self._opened is not None
        return self._opened

    def _open(self) -> None:
        with self._opening:
            if self._opened is not None:
                return
            # Others of the machine must not read what their originals may hide.
            Path(self._directory).mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._sized:
                disk = os.statvfs(self._directory)
                self.capacity = disk.f_frsize * disk.f_blocks // 2
            holds = Holds(Path(self._directory))
            with self._locked():
                self._sweep()
                self._distrust_earlier_boots(holds)
            self._opened = holds

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Yields the file of the sum, for `_used` and `_set_used`."""
        descriptor = os.open(f"{self._directory}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _distrust_earlier_boots(self, holds: Holds) -> None:
        record, boot = Path(self._directory, ".boot"), _BOOT_ID.read_text()
        if record.exists() and record.read_text() == boot:
            return
        for name, _ in self._versions():
            # One that is held is used by another machine, through a network file system.
            if not name.startswith(_UNCHECKED) and not holds.held(name):
                os.rename(self.path(name), self.unchecked(name))
        record.write_text(boot)

    def _make_room(self, uri: str, size: int) -> tuple[int, list[str]]:
        """Returns the bytes of the versions that stay, and directories to delete.

        Raises StoreFull, and drops nothing, if those that are held leave too little.
        """
        self._sweep()
        versions = self._versions()
        used = sum(bytes for _, bytes in versions)
        victims = []
        for name, bytes in versions:
            if used + size <= self.capacity:
                break
            if not self._in_use(name):
                victims.append(name)
                used -= bytes
        if used + size > self.capacity:
            raise self.full(uri, size, used)
        return used, [self._retire(name) for name in victims]

    def _in_use(self, name: str) -> bool:
        return self._holds.held(name.removeprefix(_UNCHECKED))

    def _versions(self) -> list[tuple[str, int]]:
        """(name, bytes) of each version's directory. The one held last is last."""
        found = []
        for entry in os.scandir(self._directory):
            if _KEPT.fullmatch(entry.name):
                found.append((entry.stat().st_mtime_ns, entry.name, _size(entry.path)))
        return [(name, bytes) for _, name, bytes in sorted(found)]

    def _retire(self, name: str) -> str:
        """Renames a directory, so that no crash leaves half of one under its digest."""
        retired = self._unused_name()
        os.rename(self.path(name), retired)
        return retired

    def _unused_name(self) -> str:
        return self.path(_INCOMING + secrets.token_hex(8))

    def _sweep(self) -> None:
        """Deletes what processes that died left."""
        sweep(self._directory)
        for left in Path(self._directory).glob(f"{_INCOMING}*"):
            with contextlib.suppress(OSError):  # it is in use, or gone
                descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(descriptor)

    def _used(self, lock: int) -> int:
        try:
            return int(os.pread(lock, _SUM_BYTES, 0))
        except ValueError:
            return sum(bytes for _, bytes in self._versions())


def _set_used(lock: int, bytes: int) -> None:
    # Without a truncation, after which ext4 would flush the file: a disk's time for each version.
    os.pwrite(lock, b"%-*d" % (_SUM_BYTES, bytes), 0)


def _size(directory: str) -> int:
    """Bytes of the files in it, without those that someone deleted by hand."""
    return sum(entry.stat().st_size for entry in os.scandir(directory))


def _delete(directories: Sequence[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
