"""Adapters from a web server: resumed, once for all who wait, and from no private address behind a
redirect.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from cluster import downloads
from cluster.adapter_paths import (
    CHAT_FILES,
    CONFIG_FILE,
    HEAD_BYTES,
    TEMPLATE_FILE,
    TENSORS_FILE,
    VOCABULARY_FILE,
)
from cluster.downloads import alone, sweep
from cluster.errors import AdapterFailed, AdapterMissing, AdapterRefused, StoreFull
from cluster.store import Store
from tests.unit.cluster.test_store import Found, kept
from tests.until import WORK_S

CONFIG, TENSORS = b"{}", os.urandom(300_000)
DIGEST = hashlib.sha256(CONFIG + TENSORS).hexdigest()


def inspect(path: str) -> Found:
    contents = b"".join((Path(path) / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE))
    return Found(hashlib.sha256(contents).hexdigest())


@dataclass
class Site:
    """What the server has, what becomes of requests, and what was asked: (path, Range)."""

    files: dict[str, bytes] = field(
        default_factory=lambda: {f"/a/{CONFIG_FILE}": CONFIG, f"/a/{TENSORS_FILE}": TENSORS}
    )
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    cut: int = 0  # so many answers end after half of the file
    tag: str | None = '"v1"'
    hold: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    missing: int = 404


@pytest.fixture
def site() -> Iterator[Site]:
    own = Site()
    own.hold.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            own.asked.append((self.path, asked))
            assert own.hold.wait(WORK_S)
            if self.path in own.redirects:
                self.send_response(302)
                self.send_header("Location", own.redirects[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = own.files.get(self.path)
            if data is None:
                self.send_error(own.missing)
                return
            start = 0
            if asked and self.headers.get("If-Range") == own.tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if own.tag is not None:
                self.send_header("ETag", own.tag)
            self.end_headers()
            if own.cut and len(data) > 1000:
                own.cut -= 1
                self.wfile.write(data[start : (start + len(data)) // 2])
                self.close_connection = True
                return
            self.wfile.write(data[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    own.url = f"http://127.0.0.1:{server.server_port}/a"
    yield own
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_a_cut_connection_left_is_not_asked_for_again(tmp_path: Path, site: Site) -> None:
    site.cut = 2
    assert Store(str(tmp_path), inspect).add(site.url).digest == DIGEST
    ranges = [asked for path, asked in site.asked if path.endswith(TENSORS_FILE)]
    assert ranges == [None, "bytes=150000-", "bytes=225000-"]
    assert kept(tmp_path) == {DIGEST}


def test_the_next_try_resumes_unless_the_file_is_another(tmp_path: Path, site: Site) -> None:
    store = Store(str(tmp_path), inspect)
    site.cut = downloads._TRIES
    with pytest.raises(AdapterFailed, match="download failed"):
        store.add(site.url)
    asked = len(site.asked)
    assert store.add(site.url).digest == DIGEST
    assert (f"/a/{TENSORS_FILE}", "bytes=262500-") in site.asked[asked:]
    site.cut, site.files[f"/a/{TENSORS_FILE}"] = downloads._TRIES, TENSORS[::-1]
    with pytest.raises(AdapterFailed, match="download failed"):
        store.add(site.url)
    site.tag, site.files[f"/a/{TENSORS_FILE}"] = '"v2"', TENSORS
    assert store.add(site.url).digest == DIGEST


def test_a_server_that_drips_is_given_up(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_PROGRESS_S", -1.0)
    with pytest.raises(AdapterFailed, match="less than 1048576 bytes in"):
        Store(str(tmp_path), inspect).add(site.url)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_a_server_does_not_give_is_not_there(tmp_path: Path, site: Site, status: int) -> None:
    site.files, site.missing = {}, status
    with pytest.raises(AdapterMissing, match=f"not found .*HTTP {status}"):
        Store(str(tmp_path), inspect).add(site.url)


def test_a_server_without_tags_is_asked_for_all_of_it(tmp_path: Path, site: Site) -> None:
    site.cut, site.tag = 1, None
    assert Store(str(tmp_path), inspect).add(site.url).digest == DIGEST
    assert all(asked is None for _, asked in site.asked)


def test_many_at_once_are_one_download(tmp_path: Path, site: Site) -> None:
    """Also of several processes, each of which has a store of its own."""
    stores = [Store(str(tmp_path), inspect) for _ in range(5)]
    site.hold.clear()
    with ThreadPoolExecutor(20) as pool:
        found = [pool.submit(stores[n % 5].fetch, [site.url], DIGEST) for n in range(20)]
        deadline_s = time.monotonic() + WORK_S
        while not site.asked and time.monotonic() < deadline_s:
            time.sleep(0.001)
        site.hold.set()
        assert {each.result() for each in found} == {str(tmp_path / DIGEST)}
    files = (CONFIG_FILE, TENSORS_FILE, *CHAT_FILES)
    assert [path for path, _ in site.asked] == [f"/a/{name}" for name in files]


def test_the_chat_files_come_too_if_there_are_any(tmp_path: Path, site: Site) -> None:
    site.files[f"/a/{TEMPLATE_FILE}"] = b"a template"
    store = Store(str(tmp_path), inspect)
    kept = store.fetch([site.url], store.add(site.url).digest)
    assert set(os.listdir(kept)) == {CONFIG_FILE, TENSORS_FILE, TEMPLATE_FILE}
    assert Path(kept, TEMPLATE_FILE).read_bytes() == b"a template"


def test_only_the_start_of_a_vocabulary_comes(tmp_path: Path, site: Site) -> None:
    words = os.urandom(HEAD_BYTES)
    for given in (words + bytes(1000), words, words[:1000]):
        store = Store(str(tmp_path), inspect, capacity=400_000 + HEAD_BYTES)
        site.files[f"/a/{VOCABULARY_FILE}"] = given
        version = store.fetch([site.url], store.add(site.url).digest)
        assert Path(version, VOCABULARY_FILE).read_bytes() == given[:HEAD_BYTES]
        store.close()
        store.drop_idle()


def test_so_through_fsspec(tmp_path: Path) -> None:
    files = {CONFIG_FILE: CONFIG, TENSORS_FILE: TENSORS, VOCABULARY_FILE: bytes(HEAD_BYTES + 1)}
    (tmp_path / "given").mkdir()
    for name, data in files.items():
        (tmp_path / "given" / name).write_bytes(data)
    store, uri = Store(str(tmp_path / "store"), inspect), f"local://{tmp_path}/given"
    version = store.fetch([uri], store.add(uri).digest)
    assert Path(version, VOCABULARY_FILE).read_bytes() == bytes(HEAD_BYTES)


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1/x", "http://localhost/x", "http://169.254.1.1/x", "ftp://a/x"]
)
def test_a_redirect_to_a_private_address_is_refused(
    target: str, tmp_path: Path, site: Site
) -> None:
    site.redirects[f"/a/{TENSORS_FILE}"] = target
    with pytest.raises(AdapterRefused, match=r"redirects to .*, which is no public address"):
        Store(str(tmp_path), inspect).add(site.url)
    assert kept(tmp_path) == set()


def test_a_redirect_on_the_same_server_is_followed_but_not_for_ever(
    tmp_path: Path, site: Site
) -> None:
    site.files["/elsewhere"] = TENSORS
    site.redirects[f"/a/{TENSORS_FILE}"] = "/elsewhere"
    assert Store(str(tmp_path), inspect).add(site.url).digest == DIGEST
    site.redirects[f"/a/{TENSORS_FILE}"] = f"/a/{TENSORS_FILE}"
    with pytest.raises(AdapterFailed, match="more than 5 redirects"):
        Store(str(tmp_path), inspect).add(site.url)


def test_a_public_address_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers for the name may say something else the next time."""
    first, url = httpx.URL("https://a.example/x"), httpx.URL("https://b.example/x")
    answers = {"203.0.113.9": False, "93.184.215.14": True, "::1": False, "10.0.0.1": False}
    for address, public in answers.items():
        monkeypatch.setattr(
            "socket.getaddrinfo", lambda *_, a=address, **__: [(0, 0, 0, "", (a, 443))]
        )
        if public:
            assert downloads._public_address(first, url) == address
        else:
            with pytest.raises(AdapterRefused, match=r"b\.example, which is no public"):
                downloads._public_address(first, url)
    with pytest.raises(AdapterRefused, match=r"http://b\.example"):
        downloads._public_address(first, httpx.URL("http://b.example/x"))


def test_a_file_larger_than_the_store(tmp_path: Path, site: Site) -> None:
    with pytest.raises(StoreFull, match="takes 300000 bytes, the store has room for 1000"):
        Store(str(tmp_path), inspect, 1000).add(site.url)


def test_what_is_not_there_and_what_the_server_refuses(tmp_path: Path, site: Site) -> None:
    del site.files[f"/a/{TENSORS_FILE}"]
    with pytest.raises(AdapterRefused, match="not found"):
        Store(str(tmp_path), inspect).add(site.url)
    assert kept(tmp_path) == set()


def test_parts_are_deleted_after_a_day_unless_in_use(tmp_path: Path) -> None:
    for uri in ("new", "old", "used"):
        with alone(str(tmp_path), uri) as partial:
            Path(partial, "file").touch()
            if uri != "new":
                os.utime(partial, (0, 0))
    with alone(str(tmp_path), "used") as used:
        sweep(str(tmp_path))
        assert os.path.exists(used)
    assert len(list(tmp_path.iterdir())) == 2
