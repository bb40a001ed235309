"""Adapter files on local disk, by digest: copied when an adapter is added, and never changed."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from cluster.adapter_paths import (
    TOKENIZER_FILE,
    UPLOADED,
    VOCABULARY_FILE,
    files_of,
    is_url,
    local_path,
)
from cluster.downloads import DISK_FULL, DISK_REFUSES, Peers, alone, download, no_peers, sweep
from cluster.errors import AdapterFailed, AdapterRefused, StoreFull
from cluster.file_copies import copy_file, copy_head
from cluster.holds import Holds

_INCOMING = ".incoming-"
_UNCHECKED = ".unchecked-"
_DIGEST = re.compile("[0-9a-f]{64}")
_KEPT = re.compile(rf"({re.escape(_UNCHECKED)})?{_DIGEST.pattern}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SUM_BYTES = 20


class Inspected(Protocol):
    """What an inspection found. digest: SHA-256 (hex) of the files."""

    @property
    def digest(self) -> str: ...


Info = TypeVar("Info", bound=Inspected)


class Store(Generic[Info]):
    """Blocking: call it on a thread. Any thread may call it.

        DIGEST/       the files of one version: complete, read-only, never changed
        .incoming-*/  what is being copied, received or deleted; a crash leaves it for `_sweep`
        .partial-*/   what is there of a URL (`downloads.py`)
        .unchecked-*/ versions kept before the machine last started: their data may not have reached
                      the disk, so they are inspected once before they are used
        .boot         id of the machine's start
        .held-*       which versions the processes need (`holds.py`)
        .lock         locked during each change of the above; the bytes of all versions, or more

    All processes of a node may share a directory. `add`, `keep` and `fetch` hold a version until
    `release` or the end of the process. A version that no process holds stays until room is needed.
    Those that were held last stay longest.

    inspect: checks the files in a directory, which it may rewrite, or raises AdapterRefused.
    inspect_earlier: does so as earlier releases did; None: as `inspect`.
    capacity: bytes of all versions. None: half of the directory's file system. peers: other
    replicas, which may have what was uploaded.
    """

    def __init__(
        self,
        directory: str,
        inspect: Callable[[str], Info],
        capacity: int | None = None,
        peers: Peers = no_peers,
        inspect_earlier: Callable[[str], Info] | None = None,
    ) -> None:
        self._directory = os.path.abspath(directory)
        self._inspect = inspect
        self._inspect_earlier = inspect_earlier
        self._capacity = 0 if capacity is None else capacity
        self._sized = capacity is not None
        self._peers = peers
        self._opening = threading.Lock()
        self._opened: Holds | None = None

    def add(self, uri: str) -> Info:
        """Copies the files of a path or URL, checks the copy, and holds its version.

        Raises AdapterRefused, AdapterFailed or StoreFull.
        """
        if uri.startswith(UPLOADED):
            digest = uri.removeprefix(UPLOADED)
            path = self.fetch([uri], digest)
            try:
                return self._inspected(path, uri)
            except BaseException:
                self.release(digest)
                raise
        with self._incoming(uri) as new, self._alone(uri) as partial:
            info = self._checked_copy(uri, new, partial)
            self._keep(uri, new, info.digest)
            return info

    def fetch(self, uris: Sequence[str], digest: str) -> str:
        """The directory of a version's files. Holds it, and copies the files if they are not here,
        from the first of `uris` that has them.

        Raises what the first one raises: as `add` does, or AdapterFailed if it has other files.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise AdapterFailed(f"{uris[0]}: {digest!r} is not a SHA-256 digest")
        if self._hold_present(uris[0], digest) or self._check_again(uris[0], digest):
            return self.path(digest)
        failures: list[AdapterRefused | AdapterFailed] = []
        for uri in uris:
            try:
                self._fetch_from(uri, digest)
                return self.path(digest)
            except StoreFull:
                raise
            except (AdapterRefused, AdapterFailed) as error:
                failures.append(error)
        raise failures[0]

    @contextlib.contextmanager
    def receiving(self) -> Iterator[tuple[str, int]]:
        """A new directory for files that a client sends, which is deleted at the end, and the bytes
        that they may take: what versions in use leave. Raises StoreFull.
        """
        with self._incoming("files") as new:
            with self._locked():
                used = sum(bytes for name, bytes in self._versions() if self._in_use(name))
            yield new, max(self._capacity - used, 0)

    def keep(self, new: str) -> str:
        """Checks the files that `receiving` has in its directory, and holds their version. Returns
        its digest. Raises AdapterRefused or StoreFull.
        """
        with self._disk("files"):
            digest = self._inspected(new, "files").digest
            self._keep("files", new, digest)
            return digest

    def find(self, digest: str) -> str | None:
        """The directory of a version's files, if they are here. Does not hold it."""
        path = self.path(digest)
        return path if _DIGEST.fullmatch(digest) and os.path.isdir(path) else None

    def drop_damaged(self, digest: str) -> None:
        """Drops a version's files if someone has changed them."""
        with contextlib.suppress(AdapterRefused, OSError):
            if self._inspect(self.path(digest)).digest == digest:
                return
        # If it is not there, there is nothing to drop.
        with contextlib.suppress(OSError), self._locked():
            retired = self._retire(digest)
            _delete([retired])

    def _fetch_from(self, uri: str, digest: str) -> None:
        with self._incoming(uri) as new, self._alone(uri) as partial:
            if partial and self._hold_present(uri, digest):
                return  # another process or thread has downloaded it meanwhile
            found = self._checked_copy(uri, new, partial).digest
            # Replicas of earlier releases added it without tokens, or without the whole file.
            if found != digest and os.path.exists(f"{new}/{TOKENIZER_FILE}"):
                found = self._inspected(new, uri, self._inspect_earlier).digest
            if found != digest and os.path.exists(f"{new}/{TOKENIZER_FILE}"):
                os.unlink(f"{new}/{TOKENIZER_FILE}")
                found = self._inspected(new, uri).digest
            if found != digest:
                raise AdapterFailed(f"{uri}: its files changed (digest {found}, not {digest})")
            self._keep(uri, new, digest)

    def hold_again(self, digest: str) -> bool:
        """Holds a version that this process holds already; False if it does not. Does no I/O."""
        return self._opened is not None and self._opened.hold_again(digest)

    def path(self, digest: str) -> str:
        """Where the files of a version are while it is held."""
        return f"{self._directory}/{digest}"

    def release(self, digest: str) -> None:
        """Ends one hold of `add` or `fetch`."""
        if self._opened is not None and self._opened.release(digest):
            with contextlib.suppress(OSError):  # someone deleted it by hand
                os.utime(self.path(digest))

    def close(self) -> None:
        """Ends all holds."""
        if self._opened is not None:
            self._opened.close()

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
                self._capacity = disk.f_frsize * disk.f_blocks // 2
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

    @contextlib.contextmanager
    def _disk(self, uri: str) -> Iterator[None]:
        """Turns an error of the store's own disk into StoreFull."""
        try:
            yield
        except OSError as error:
            raise StoreFull(f"{uri}: the store {self._directory} failed: {error}") from error

    @contextlib.contextmanager
    def _incoming(self, uri: str) -> Iterator[str]:
        """A new directory, which is deleted at the end unless it was renamed."""
        with self._disk(uri), contextlib.ExitStack() as stack:
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

    def _alone(self, uri: str) -> contextlib.AbstractContextManager[str]:
        return alone(self._directory, uri) if is_url(uri) else contextlib.nullcontext("")

    def _checked_copy(self, uri: str, new: str, partial: str) -> Info:
        """Checks the copy, because the files at `uri` may change at any time."""
        where = uri if is_url(uri) else local_path(uri)
        try:
            self._copy(where, new, partial)
        except OSError as error:
            if error.errno not in DISK_FULL or not self.drop_idle():
                raise
            for name in os.listdir(new):
                os.unlink(f"{new}/{name}")
            self._copy(where, new, partial)
        return self._inspected(new, where)

    def _inspected(
        self, path: str, shown: str, inspect: Callable[[str], Info] | None = None
    ) -> Info:
        """shown: what a refusal calls the path."""
        try:
            return (inspect or self._inspect)(path)
        except AdapterRefused as error:
            message = error.message.replace(path, shown)
            raise AdapterRefused(message, field=error.field) from None

    def _copy(self, where: str, new: str, partial: str) -> None:
        """Raises OSError if the store's disk is at fault."""
        if is_url(where):
            download(where, new, partial, self._capacity, self._peers)
            return
        try:
            before = _stamps(where)
            size = sum(size for _, size, _ in before)
            if size > self._capacity:
                raise self._full(where, size, 0)
            for name in files_of(where):
                copy = copy_head if name == VOCABULARY_FILE else copy_file
                copy(f"{where}/{name}", f"{new}/{name}")
            changed = _stamps(where) != before
        except OSError as error:
            if error.errno in DISK_REFUSES:
                raise
            raise AdapterRefused(f"{where}: {error}", field="lora_path") from error
        if changed:
            raise AdapterFailed(
                f"{where}: its files changed while they were copied",
                field="lora_path",
                retry_after_s=1.0,
            )

    def _hold_present(self, uri: str, digest: str) -> bool:
        """Holds the version if its files are here."""
        with self._disk(uri):
            self._open()
            with self._locked():
                present = os.path.isdir(self.path(digest))
                if present:
                    self._holds.hold(digest)
                    os.utime(self.path(digest))
                return present

    def _distrust_earlier_boots(self, holds: Holds) -> None:
        record, boot = Path(self._directory, ".boot"), _BOOT_ID.read_text()
        if record.exists() and record.read_text() == boot:
            return
        for name, _ in self._versions():
            # One that is held is used by another machine, through a network file system.
            if not name.startswith(_UNCHECKED) and not holds.held(name):
                os.rename(self.path(name), self.path(_UNCHECKED + name))
        record.write_text(boot)

    def _check_again(self, uri: str, digest: str) -> bool:
        """Holds the version if its files are here from before the machine last started."""
        unchecked = self.path(_UNCHECKED + digest)
        # If it is not there, they are damaged, or another process was first.
        with contextlib.suppress(AdapterRefused, OSError):
            if self._inspect(unchecked).digest == digest:
                with self._locked():
                    os.rename(unchecked, self.path(digest))
        return self._hold_present(uri, digest)

    def _keep(self, uri: str, new: str, digest: str) -> None:
        """Moves the files to their place, and holds them."""
        target, size = self.path(digest), _size(new)
        retired: list[str] = []
        with self._locked() as lock:
            if os.path.isdir(target) and _size(target) != size:
                retired.append(self._retire(digest))  # someone damaged it
            if not os.path.isdir(target):
                used = self._used(lock)
                if used + size > self._capacity:
                    used, victims = self._make_room(uri, size)
                    retired += victims
                # Before the rename: a crash between the two leaves a sum that is too large, which
                # `_make_room` corrects.
                _set_used(lock, used + size)
                os.rename(new, target)
            self._holds.hold(digest)
        _delete(retired)

    def _make_room(self, uri: str, size: int) -> tuple[int, list[str]]:
        """Returns the bytes of the versions that stay, and directories to delete.

        Raises StoreFull, and drops nothing, if those that are held leave too little.
        """
        self._sweep()
        versions = self._versions()
        used = sum(bytes for _, bytes in versions)
        victims = []
        for name, bytes in versions:
            if used + size <= self._capacity:
                break
            if not self._in_use(name):
                victims.append(name)
                used -= bytes
        if used + size > self._capacity:
            raise self._full(uri, size, used)
        return used, [self._retire(name) for name in victims]

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

    def _full(self, uri: str, size: int, used: int) -> StoreFull:
        return StoreFull(
            f"{uri}: takes {size} bytes, but adapters in use take {used} of the {self._capacity} "
            f"bytes of the store {self._directory} (adapter_disk)"
        )


def _set_used(lock: int, bytes: int) -> None:
    # Without a truncation, after which ext4 would flush the file: a disk's time for each version.
    os.pwrite(lock, b"%-*d" % (_SUM_BYTES, bytes), 0)


def stamps(uri: str) -> list[tuple[int, int, int]]:
    """Differ if the files of a path have changed. Empty if they are not there, and for a URL."""
    with contextlib.suppress(OSError, ValueError):
        return [] if is_url(uri) else _stamps(local_path(uri))
    return []


def _stamps(directory: str) -> list[tuple[int, int, int]]:
    """(inode, bytes, time of the last change) of each file."""
    found = [os.stat(f"{directory}/{name}") for name in files_of(directory)]
    return [(entry.st_ino, entry.st_size, entry.st_mtime_ns) for entry in found]


def _size(directory: str) -> int:
    """Bytes of the files in it, without those that someone deleted by hand."""
    return sum(entry.stat().st_size for entry in os.scandir(directory))


def _delete(directories: Sequence[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
