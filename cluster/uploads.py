"""An adapter's files that a client sends: written to the store's disk as they come."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from cluster.adapter_paths import CHAT_FILES, CONFIG_FILE, TENSORS_FILE, TENSORS_FILES, UPLOADED
from cluster.downloads import DISK_FULL
from cluster.errors import BadRequest, StoreFull
from cluster.store import Store


class Upload:
    """Blocking: call it on threads. `close` may come from another one, and leaves nothing behind
    but what was kept.

    refused: the catalog does not have what was kept, so that it goes too.
    """

    def __init__(self, store: Store[Any]) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._ends = contextlib.ExitStack()
        self._closed = False
        self._directory: str | None = None
        self._bytes_left = 0
        self._names: list[str] = []
        self._file: int | None = None
        self.refused = False

    def open(self, name: str) -> None:
        """Begins a file. Raises BadRequest for one that an adapter does not have, or StoreFull."""
        with self._using():
            files = (CONFIG_FILE, *TENSORS_FILES, *CHAT_FILES)
            if name not in files:
                known = ", ".join(files)
                raise _wrong(f"{name[:100]!r} is not a file of an adapter ({known})")
            if name in self._names or (name in TENSORS_FILES and self._tensors):
                raise _wrong(f"{name} comes after {self._names[-1]}; send one of each kind")
            if self._directory is None:
                self._directory, self._bytes_left = self._ends.enter_context(
                    self._store.receiving()
                )
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(f"{self._directory}/{name}", flags, 0o444)
            self._ends.callback(os.close, self._file)
            self._names.append(name)

    def write(self, data: bytes) -> None:
        """Adds to the file that was opened last. Raises StoreFull."""
        with self._using():
            assert self._file is not None
            self._bytes_left -= len(data)
            if self._bytes_left < 0:
                raise StoreFull("files: larger than the room that the store has (adapter_disk)")
            left = memoryview(data)
            while left:
                try:
                    left = left[os.write(self._file, left) :]
                except OSError as error:
                    if error.errno not in DISK_FULL or not self._store.drop_idle():
                        raise

    def keep(self) -> str:
        """Checks the files, and holds their version until `close`. Returns its URL.

        Raises BadRequest, AdapterRefused or StoreFull.
        """
        with self._using():
            if CONFIG_FILE not in self._names or not self._tensors:
                raise _wrong(f"must be {CONFIG_FILE} and {TENSORS_FILE} (got {self._names})")
            assert self._directory is not None
            digest = self._store.keep(self._directory)
            if not os.path.exists(self._directory):  # it was not there before
                self._ends.callback(self._drop_refused, digest)
            self._ends.callback(self._store.release, digest)
            return UPLOADED + digest

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            self._ends.close()

    def _drop_refused(self, digest: str) -> None:
        if self.refused:
            with contextlib.suppress(OSError):  # then it goes when room is needed
                self._store.drop_idle(digest)

    @property
    def _tensors(self) -> bool:
        return any(name in TENSORS_FILES for name in self._names)

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        with self._lock:
            assert not self._closed  # who waits for this thread has given it up
            try:
                yield
            except OSError as error:
                raise StoreFull(f"files: the store's disk failed: {error}") from error


def _wrong(reason: str) -> BadRequest:
    return BadRequest(f"files: {reason}", field="files")
