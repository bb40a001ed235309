"""Downloads an adapter's files: one at a time for each URL on a node.

https://, http://   resumed where the last try ended; redirects do not lead to private addresses
upload://           from other replicas in the same way; nobody else has what a client sent
s3://, hf://, …     through fsspec, each file as a whole
"""

import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cluster.adapter_paths import (
    CHAT_FILES,
    CONFIG_FILE,
    HEAD_BYTES,
    TENSORS_FILES,
    UPLOADED,
    VOCABULARY_FILE,
)
from cluster.errors import AdapterFailed, AdapterMissing, AdapterRefused, StoreFull

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
DISK_REFUSES = DISK_FULL | {errno.EROFS}
_PARTIAL = ".partial-"
# Of what a download left that was cut off.
_KEPT_S = 24 * 3600.0
_REDIRECTS_MAX = 5
_TRIES = 3
_TIMEOUT_S = 30.0
# A server has this long for this much, again and again.
_PROGRESS_S = 60.0
_PROGRESS_BYTES = 2**20
# A bucket whose keys nobody may list says 403 of those that are not there.
_NOT_THERE = frozenset((403, 404, 410))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
# Where a replica gives files to others: DIGEST/NAME follow.
PEER_PATH = "/internal/adapters"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another replica. url: of its server. key: what it gives files for."""

    url: str
    key: str = field(repr=False)


Peers = Callable[[], Sequence[Peer]]
"""The live ones. Blocking. Raises CatalogUnavailable."""


def no_peers() -> Sequence[Peer]:
    return ()


class _NotFound(Exception):
    pass


@contextlib.contextmanager
def alone(store: str, uri: str) -> Iterator[str]:
    """Waits until no other process or thread of the node downloads the URL. Yields a directory for
    what is there of it. store: the directory that it is in.
    """
    path = f"{store}/{_PARTIAL}{hashlib.sha256(uri.encode()).hexdigest()[:32]}"
    descriptor = _locked(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # a part is left for the next try
            os.rmdir(path)
        os.close(descriptor)


def _locked(path: str) -> int:
    """Makes the directory if there is none, and waits for its lock. Returns its descriptor."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode=0o700)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # whoever had it has deleted it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def sweep(store: str) -> None:
    """Deletes what was left a day ago."""
    for left in Path(store).glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):  # it is in use, or gone
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_mtime < time.time() - _KEPT_S:
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def download(uri: str, target: str, partial: str, bytes_max: int, peers: Peers = no_peers) -> None:
    """Downloads an adapter's files into `target`. partial: the directory of `alone`.

    bytes_max: of each file. Raises AdapterRefused (AdapterMissing if there is nothing),
    AdapterFailed, StoreFull, or OSError if the disk is at fault.
    """
    source: _Replicas | _Web | _Files
    if uri.startswith(UPLOADED):
        source = _Replicas(uri, peers())
    else:
        source = _Web(uri) if uri.startswith(("https://", "http://")) else _Files(uri)
    try:
        source.get(CONFIG_FILE, partial, bytes_max)
        for name in TENSORS_FILES:
            with contextlib.suppress(_NotFound):
                source.get(name, partial, bytes_max)
                break
        else:
            raise _NotFound(f"no {TENSORS_FILES[0]}")
        for name in CHAT_FILES:
            with contextlib.suppress(_NotFound):
                source.get(name, partial, bytes_max)
    except _NotFound as error:
        kind = AdapterRefused if os.path.exists(f"{partial}/{CONFIG_FILE}") else AdapterMissing
        shutil.rmtree(partial, ignore_errors=True)
        raise kind(f"{uri}: not found ({error})", field="lora_path") from error
    except AdapterRefused:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except AdapterFailed:
        raise
    except (ImportError, ValueError) as error:
        raise AdapterRefused(f"{uri}: cannot be read ({error})", field="lora_path") from error
    except Exception as error:  # each filesystem raises its own exceptions
        if isinstance(error, OSError) and error.errno in DISK_REFUSES:
            raise
        raise AdapterFailed(f"{uri}: download failed ({error})") from error
    for name in (CONFIG_FILE, *TENSORS_FILES, *CHAT_FILES):
        if os.path.exists(f"{partial}/{name}"):
            os.chmod(f"{partial}/{name}", 0o444)
            os.rename(f"{partial}/{name}", f"{target}/{name}")
    for left in os.listdir(partial):
        os.unlink(f"{partial}/{left}")


def _too_large(uri: str, size: int, most: int) -> StoreFull:
    return StoreFull(f"{uri}: takes {size} bytes, the store has room for {most} (adapter_disk)")


class _Files:
    """Through fsspec."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._opened: tuple[Any, str] | None = None

    def get(self, name: str, target: str, bytes_max: int) -> None:
        import fsspec  # most fleets use paths and need not import it

        if self._opened is None:
            self._opened = fsspec.core.url_to_fs(self._uri)
        files, top = self._opened
        path = f"{top.rstrip('/')}/{name}"
        try:
            size = files.size(path) or 0
        except (FileNotFoundError, PermissionError) as error:  # as of `_NOT_THERE`
            raise _NotFound(str(error)) from error
        if name == VOCABULARY_FILE:
            Path(target, name).write_bytes(files.cat_file(path, 0, min(size, HEAD_BYTES)))
            return
        if size > bytes_max:
            raise _too_large(self._uri, size, bytes_max)
        files.get_file(path, f"{target}/{name}")


class _Replicas:
    """Each file from the first replica that gives it."""

    def __init__(self, uri: str, peers: Sequence[Peer]) -> None:
        self._uri = uri
        path = f"{PEER_PATH}/{uri.removeprefix(UPLOADED)}"
        self._peers = [
            _Web(peer.url + path, {"Authorization": f"Bearer {peer.key}"}, trust_env=False)
            for peer in peers
        ]

    def get(self, name: str, target: str, bytes_max: int) -> None:
        import httpx  # as fsspec above

        for peer in self._peers:
            try:
                peer.get(name, target, bytes_max)
                return
            except StoreFull:
                raise
            except (_NotFound, AdapterFailed, httpx.TransportError) as error:
                log.info("%s: not from a replica: %s", self._uri, error)
        if name in CHAT_FILES:  # the digest tells if it was only missed
            raise _NotFound(name)
        raise AdapterFailed(
            f"{self._uri}: it was uploaded, and no live replica has its files; upload it again"
        )


class _Web:
    """trust_env: the environment may name a proxy."""

    def __init__(
        self, uri: str, headers: Mapping[str, str] = {}, *, trust_env: bool = True
    ) -> None:
        self._uri = uri
        self._headers = headers
        self._trust_env = trust_env

    def get(self, name: str, target: str, bytes_max: int) -> None:
        import httpx  # as fsspec above

        for tries_left in reversed(range(_TRIES)):
            try:
                self._try(f"{self._uri.rstrip('/')}/{name}", f"{target}/{name}", bytes_max)
                return
            except httpx.TransportError:
                if not tries_left:
                    raise

    def _try(self, uri: str, path: str, bytes_max: int) -> None:
        """Goes on where the file ends, if the server still has the same one."""
        tag = Path(f"{path}.tag")
        start = os.path.getsize(path) if os.path.exists(path) and tag.exists() else 0
        headers = {"Accept-Encoding": "identity", **self._headers}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": tag.read_text()}
        with _opened(uri, headers, self._trust_env) as answer:
            if start and answer.status_code == 416:  # it had all of it
                return
            if answer.status_code in _NOT_THERE:
                raise _NotFound(f"{uri}: HTTP {answer.status_code}")
            if answer.status_code not in (200, 206):
                raise AdapterFailed(f"{uri}: HTTP {answer.status_code}")
            # A weak tag does not say that bytes are the same.
            etag = answer.headers.get("etag", "")
            if etag.startswith('"'):
                tag.write_text(etag)
            else:
                tag.unlink(missing_ok=True)
            with open(path, "ab" if answer.status_code == 206 else "wb") as file:
                head = path.endswith(f"/{VOCABULARY_FILE}")
                _write(answer, file, uri, bytes_max, HEAD_BYTES if head else None)


def _write(
    answer: "httpx.Response", file: BinaryIO, uri: str, bytes_max: int, head: int | None
) -> None:
    """head: no more than this is wanted of the file."""
    size = file.seek(0, os.SEEK_END)
    announced = size + int(answer.headers.get("content-length") or 0)
    if head is None and announced > bytes_max:
        raise _too_large(uri, announced, bytes_max)
    left, late_s = _PROGRESS_BYTES, time.monotonic() + _PROGRESS_S
    for piece in answer.iter_raw():
        left -= len(piece)
        if left <= 0:
            left, late_s = _PROGRESS_BYTES, time.monotonic() + _PROGRESS_S
        elif time.monotonic() > late_s:
            raise AdapterFailed(f"{uri}: less than {_PROGRESS_BYTES} bytes in {_PROGRESS_S:.0f} s")
        size += len(piece)
        if size > bytes_max:
            raise _too_large(uri, size, bytes_max)
        file.write(piece)
        if head is not None and size >= head:
            file.truncate(head)
            return


@contextlib.contextmanager
def _opened(uri: str, headers: dict[str, str], trust_env: bool) -> Iterator["httpx.Response"]:
    """Follows redirects. Raises AdapterRefused for one that leads to a private address."""
    import httpx

    first = url = httpx.URL(uri)
    with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=trust_env) as client:
        for _ in range(_REDIRECTS_MAX + 1):
            own = (url.scheme, url.host, url.port) == (first.scheme, first.host, first.port)
            address = url.host if own else _public_address(first, url)
            asked = client.build_request(
                "GET",
                url.copy_with(host=address),
                headers={**headers, "Host": url.netloc.decode()},
                extensions={"sni_hostname": url.host},
            )
            with contextlib.closing(client.send(asked, stream=True)) as answer:
                if answer.status_code not in _REDIRECTS:
                    yield answer
                    return
                url = url.join(answer.headers.get("location", ""))
    raise AdapterFailed(f"{uri}: more than {_REDIRECTS_MAX} redirects")


def _public_address(first: "httpx.URL", url: "httpx.URL") -> str:
    """The address to connect to, so that no later answer of the name server is used."""
    refused = AdapterRefused(
        f"{first}: redirects to {url.scheme}://{url.netloc.decode()}, which is no public address",
        field="lora_path",
    )
    if url.scheme not in ("https", first.scheme):
        raise refused
    port = url.port or {"https": 443, "http": 80}[url.scheme]
    found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(ipaddress.ip_address(a).is_global for a in addresses):
        raise refused
    return addresses[0]
