"""Adapter files on local disk, by digest: copied when an adapter is added, and never changed.
`store_directory.py` has where they lie.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from cluster.adapter_paths import (
    TOKENIZER_FILE,
    UPLOADED,
    VOCABULARY_FILE,
    files_of,
    is_url,
    local_path,
)
from cluster.downloads import DISK_FULL, DISK_REFUSES, Peers, alone, download, no_peers
from cluster.errors import AdapterFailed, AdapterRefused, StoreFull
from cluster.file_copies import copy_file, copy_head
from cluster.store_directory import DIGEST, StoreDirectory


class Inspected(Protocol):
    """What an inspection found. digest: SHA-256 (hex) of the files."""

    @property
    def digest(self) -> str: ...


Info = TypeVar("Info", bound=Inspected)


class Store(Generic[Info]):
    """Blocking: call it on a thread. Any thread may call it.

    All processes of a node may share a directory. `add`, `keep` and `fetch` hold a version until
    `release` or the end of the process.

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
        self._directory = StoreDirectory(directory, capacity)
        self._inspect = inspect
        self._inspect_earlier = inspect_earlier
        self._peers = peers

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
        with self._directory.incoming(uri) as new, self._alone(uri) as partial:
            info = self._checked_copy(uri, new, partial)
            self._directory.keep(uri, new, info.digest)
            return info

    def fetch(self, uris: Sequence[str], digest: str) -> str:
        """The directory of a version's files. Holds it, and copies the files if they are not here,
        from the first of `uris` that has them.

        Raises what the first one raises: as `add` does, or AdapterFailed if it has other files.
        """
        if DIGEST.fullmatch(digest) is None:
            raise AdapterFailed(f"{uris[0]}: {digest!r} is not a SHA-256 digest")
        if self._directory.hold_present(uris[0], digest) or self._check_again(uris[0], digest):
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
        with self._directory.incoming("files") as new:
            yield new, self._directory.left()

    def keep(self, new: str) -> str:
        """Checks the files that `receiving` has in its directory, and holds their version. Returns
        its digest. Raises AdapterRefused or StoreFull.
        """
        with self._directory.disk("files"):
            digest = self._inspected(new, "files").digest
            self._directory.keep("files", new, digest)
            return digest

    def find(self, digest: str) -> str | None:
        """The directory of a version's files, if they are here. Does not hold it."""
        path = self.path(digest)
        return path if DIGEST.fullmatch(digest) and os.path.isdir(path) else None

    def drop_damaged(self, digest: str) -> None:
        """Drops a version's files if someone has changed them."""
        with contextlib.suppress(AdapterRefused, OSError):
            if self._inspect(self.path(digest)).digest == digest:
                return
        with contextlib.suppress(OSError):  # if it is not there, there is nothing to drop
            self._directory.drop(digest)

    def drop_idle(self, only: str | None = None) -> bool:
        """Drops all versions, or this one, that no process holds. False if there are none."""
        return self._directory.drop_idle(only)

    def hold_again(self, digest: str) -> bool:
        """Holds a version that this process holds already; False if it does not. Does no I/O."""
        return self._directory.hold_again(digest)

    def path(self, digest: str) -> str:
        """Where the files of a version are while it is held."""
        return self._directory.path(digest)

    def release(self, digest: str) -> None:
        """Ends one hold of `add` or `fetch`."""
        self._directory.release(digest)

    def close(self) -> None:
        """Ends all holds."""
        self._directory.close()

    def _fetch_from(self, uri: str, digest: str) -> None:
        with self._directory.incoming(uri) as new, self._alone(uri) as partial:
            if partial and self._directory.hold_present(uri, digest):
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
            self._directory.keep(uri, new, digest)

    def _alone(self, uri: str) -> contextlib.AbstractContextManager[str]:
        return alone(str(self._directory), uri) if is_url(uri) else contextlib.nullcontext("")

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
            download(where, new, partial, self._directory.capacity, self._peers)
            return
        try:
            before = _stamps(where)
            size = sum(size for _, _, size, _ in before)
            if size > self._directory.capacity:
                raise self._directory.full(where, size, 0)
            for name, *_ in before:
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

    def _check_again(self, uri: str, digest: str) -> bool:
        """Holds the version if its files are here from before the machine last started."""
        unchecked = self._directory.unchecked(digest)
        # If it is not there, they are damaged, or another process was first.
        with contextlib.suppress(AdapterRefused, OSError):
            if self._inspect(unchecked).digest == digest:
                self._directory.believe(digest)
        return self._directory.hold_present(uri, digest)


def stamps(uri: str) -> list[tuple[str, int, int, int]]:
    """Differ if the files of a path have changed. Empty if they are not there, and for a URL."""
    with contextlib.suppress(OSError, ValueError):
        return [] if is_url(uri) else _stamps(local_path(uri))
    return []


def _stamps(directory: str) -> list[tuple[str, int, int, int]]:
    """(name, inode, bytes, time of the last change) of each file."""
    found = ((name, os.stat(f"{directory}/{name}")) for name in files_of(directory))
    return [(name, entry.st_ino, entry.st_size, entry.st_mtime_ns) for name, entry in found]
