"""An adapter whose files come with the request: on disk, bounded, and nothing of it left behind."""

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.adapter_paths import CONFIG_FILE, MLX_FILE, TENSORS_FILE
from cluster.config import FleetConfig
from cluster.uploads import Upload
from replica.adapters.adapter_files import inspect
from replica.api import upload_form
from replica.api.access import Rules
from replica.api.server import ServerConfig, build_app
from replica.model.shape import read_shape
from replica.serving.local_catalog import LocalCatalog
from tests.serving import CONFIG, client_of, live
from tests.serving import text as tokenizer
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, WORK_S, until

LOAD = "/v1/load_lora_adapter"
KEYS = Rules(("sk-use",), ("sk-admin",), "sk-operator", changes=False)
ADMIN = {"authorization": "Bearer sk-admin"}

FORM = {"content-type": "multipart/form-data; boundary=x"}
# The beginning of a form, in the middle of a file.
OPENED = (
    f"--x\r\nContent-Disposition: form-data; name=files; filename={TENSORS_FILE}\r\n\r\n"
).encode()

File = tuple[str, tuple[str, bytes]]


class Replica:
    """A catalog on a directory, and the app over it."""

    def __init__(self, tmp_path: Path, server: ServerConfig = CONFIG, **config: Any) -> None:
        self.directory = tmp_path / "fleet"
        self.config = FleetConfig(
            settled_config(write_model_config(tmp_path / "base")),
            directory=str(self.directory),
            **config,
        )
        self.engine = StubEngine()
        self.catalog = LocalCatalog(self.engine, self.config)
        self.app = build_app(self.engine, self.catalog, tokenizer(), server)

    async def post(self, *files: File, headers: Any = None, **fields: str) -> httpx.Response:
        async with client_of(self.app) as client:
            return await client.post(LOAD, data=fields, files=files, headers=headers)

    def names(self) -> list[str]:
        return [version.name for version in self.catalog.versions()]

    def kept(self) -> list[str]:
        """What the store has, but for its own files."""
        store = self.directory / "adapters"
        own = (".lock", ".boot", ".held-")
        return sorted(e.name for e in store.glob("*") if not e.name.startswith(own))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(write_adapter(tmp_path / "trained"))


def parts(directory: Path, *names: str) -> list[File]:
    names = names or (CONFIG_FILE, TENSORS_FILE)
    return [("files", (name, (directory / name).read_bytes())) for name in names]


def digest_of(replica: Replica, directory: Path) -> str:
    return inspect(str(directory), read_shape(replica.config.engine.model), 64, "float32").digest


async def test_a_client_that_sends_files_is_served_them(tmp_path: Path, adapter: Path) -> None:
    replica = Replica(tmp_path)
    answer = await replica.post(*parts(adapter), lora_name="mine", weight="2", pinned="true")
    assert answer.status_code == 200, answer.text
    assert answer.text == "Success: LoRA adapter 'mine' added successfully."
    digest = digest_of(replica, adapter)
    assert answer.headers["x-lorafleet-digest"] == digest
    (version,) = replica.catalog.versions()
    assert (version.digest, version.uri) == (digest, f"upload://{digest}")
    assert version.weight == 2 and version.pinned
    path = replica.engine.paths[digest]
    assert set(os.listdir(path)) == {CONFIG_FILE, TENSORS_FILE}
    assert os.stat(os.path.dirname(path)).st_mode & 0o077 == 0
    assert all(entry.stat().st_mode & 0o222 == 0 for entry in os.scandir(path))
    async with client_of(replica.app) as client:
        body = {"model": "mine", "prompt": "hello", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert replica.kept() == [digest]


async def test_it_is_the_version_that_the_same_path_would_be(tmp_path: Path, adapter: Path) -> None:
    replica = Replica(tmp_path)
    by_path = (await replica.catalog.add("path", str(adapter), trusted=True)).digest
    answer = await replica.post(*parts(adapter), lora_name="sent")
    assert answer.headers["x-lorafleet-digest"] == by_path
    assert replica.kept() == [by_path]


async def test_a_training_loop_pushes_version_after_version(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    digests = []
    for step in range(3):
        files = parts(Path(write_adapter(tmp_path / str(step), seed=step)))
        answer = await replica.post(*files, lora_name="run", load_inplace="true")
        digests.append(answer.headers["x-lorafleet-digest"])
    assert len(set(digests)) == 3
    assert [version.digest for version in replica.catalog.versions()] == digests[-1:]
    again = await replica.post(*files, lora_name="run")
    assert again.status_code == 200, "the same content is no error"
    kept = replica.kept()
    other = await replica.post(*parts(Path(write_adapter(tmp_path / "3", seed=3))), lora_name="run")
    assert (other.status_code, other.json()["error"]["param"]) == (400, "lora_name")
    assert replica.kept() == kept
    # What was here before stays.
    assert (await replica.post(*parts(tmp_path / "0"), lora_name="run")).status_code == 400
    assert replica.kept() == kept


async def test_fields_may_come_after_the_files(tmp_path: Path, adapter: Path) -> None:
    replica = Replica(tmp_path)
    files = [*parts(adapter), ("lora_name", (None, b"late"))]
    async with client_of(replica.app) as client:
        answer = await client.post(LOAD, files=files)
    assert answer.status_code == 200, answer.text
    assert replica.names() == ["late"]


def stray(name: str) -> Any:
    return ("files", (name, b"x"))


@pytest.mark.parametrize(
    ("extra", "fields", "named"),
    [
        ([stray("notes.txt")], {}, "files: 'notes.txt' is not a file of an adapter"),
        ([stray("../adapter_config.json")], {}, "files: '../adapter_config.json' is not"),
        ([stray(f"/{CONFIG_FILE}")], {}, f"files: '/{CONFIG_FILE}' is not"),
        ([stray(CONFIG_FILE)], {}, f"files: {CONFIG_FILE} comes after {TENSORS_FILE}"),
        ([stray(MLX_FILE)], {}, f"files: {MLX_FILE} comes after {TENSORS_FILE}"),
        ([("tensors", (CONFIG_FILE, b"x"))], {}, 'files: a file came as "tensors"'),
        ([("files", (None, b"x"))], {}, "files: has no filename"),
        ([("lora_name", (None, b"twice"))], {}, "lora_name: comes twice"),
        ([("weight", (None, b"9" * 5000))], {}, "weight: larger than 4096 bytes"),
        ([], {"lora_path": "/etc"}, "lora_path: unknown field"),
        ([], {"weight": "-1"}, "weight: "),
        ([], {"weight": "nan"}, "weight: "),
        ([], {"pinned": "perhaps"}, "pinned: "),
        ([], {"lora_name": "tiny"}, "lora_name: "),
        ([], {"lora_name": "\u202e"}, "lora_name: "),
        ([], {"lora_name": ""}, "lora_name: "),
    ],
)
async def test_what_else_a_form_has_is_refused_by_name(
    tmp_path: Path, adapter: Path, extra: list[Any], fields: dict[str, str], named: str
) -> None:
    replica = Replica(tmp_path)
    answer = await replica.post(*parts(adapter), *extra, **{"lora_name": "mine", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(named)
    assert replica.names() == replica.kept() == []


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([CONFIG_FILE], f"files: must be {CONFIG_FILE} and {TENSORS_FILE} (got ['{CONFIG_FILE}'])"),
        ([TENSORS_FILE], f"files: must be {CONFIG_FILE} and {TENSORS_FILE} (got ["),
        ([], "files: required"),
    ],
)
async def test_a_file_that_is_missing_is_named(
    tmp_path: Path, adapter: Path, names: list[str], named: str
) -> None:
    replica = Replica(tmp_path)
    files = parts(adapter, *names) if names else [("lora_name", (None, b"mine"))]
    answer = await replica.post(*files, **({"lora_name": "mine"} if names else {}))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(named)
    assert replica.kept() == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b"", "multipart/form-data; boundary=x", 400),
        (b"{}", "multipart/form-data", 400),
        (b"--x\r\nno header at all\r\n\r\nhello\r\n--x--", "multipart/form-data; boundary=x", 400),
        (b"a" * 400_000, "multipart/form-data; boundary=x", 400),
        (b"--x\r\n" + b"a: b\r\n" * 100_000, "multipart/form-data; boundary=x", 400),
        (b"{}", "multipart/mixed; boundary=x", 415),
    ],
)
async def test_a_body_that_is_no_form_is_refused(
    tmp_path: Path, body: bytes, kind: str, status: int
) -> None:
    replica = Replica(tmp_path)
    async with client_of(replica.app) as client:
        answer = await client.post(LOAD, content=body, headers={"content-type": kind})
        assert answer.status_code == status, answer.text
        compressed = {"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}
        assert (await client.post(LOAD, content=body, headers=compressed)).status_code == 415


async def test_a_form_without_its_end_is_refused(tmp_path: Path, adapter: Path) -> None:
    replica = Replica(tmp_path)
    request = httpx.Request("POST", "http://x", data={"lora_name": "a"}, files=parts(adapter))
    body, kind = request.read(), {"content-type": request.headers["content-type"]}
    async with client_of(replica.app) as client:
        cut = await client.post(LOAD, content=body.rpartition(b"\r\n--")[0], headers=kind)
        assert cut.status_code == 400 and "well-formed" in cut.json()["error"]["message"]
        assert replica.names() == replica.kept() == []
        assert (await client.post(LOAD, content=body, headers=kind)).status_code == 200


async def test_an_adapter_that_cannot_be_served_leaves_nothing(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    files = parts(Path(write_adapter(tmp_path / "large", rank=512)))
    answer = await replica.post(*files, lora_name="mine")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "adapter_refused", "files")
    assert "512" in error["message"] and str(tmp_path) not in error["message"]
    assert replica.names() == replica.kept() == []


async def test_files_larger_than_the_store_has_room_for_are_cut(
    tmp_path: Path, adapter: Path
) -> None:
    size = sum(len(content) for _, (_, content) in parts(adapter))
    replica = Replica(tmp_path, adapter_disk=2 * size - 1)
    assert (await replica.post(*parts(adapter), lora_name="held")).status_code == 200
    held = replica.kept()
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield OPENED
        while sent < 2**24:
            sent += 2**16
            yield bytes(2**16)

    async with client_of(replica.app) as client:
        answer = await client.post(LOAD, content=endless(), headers=FORM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "store_full")
    assert "adapter_disk" in answer.json()["error"]["message"]
    assert sent == 2**16, "no more is read than there is room for"
    assert replica.names() == ["held"] and replica.kept() == held
    other = parts(Path(write_adapter(tmp_path / "other", seed=1)))
    assert (await replica.post(*other, lora_name="new")).status_code == 507
    # What nobody needs makes room.
    await replica.catalog.remove("held")
    assert (await replica.post(*other, lora_name="new")).status_code == 200
    assert replica.names() == ["new"] and len(replica.kept()) == 1


@pytest.mark.parametrize("always", [False, True])
async def test_on_a_full_disk_what_nobody_needs_makes_room(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    replica = Replica(tmp_path)
    assert (await replica.post(*parts(adapter), lora_name="old")).status_code == 200
    (old,) = replica.kept()
    await replica.catalog.remove("old")
    other = parts(Path(write_adapter(tmp_path / "other", seed=1)))
    write = os.write

    def write_some(file: int, data: memoryview) -> int:
        if isinstance(data, memoryview) and (always or old in replica.kept()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:100])

    monkeypatch.setattr(os, "write", write_some)
    answer = await replica.post(*other, lora_name="new")
    assert answer.status_code == (507 if always else 200), answer.text
    assert replica.names() == ([] if always else ["new"])
    assert old not in replica.kept() and len(replica.kept()) == len(replica.names())


class Client:
    """A connection that sends the beginning of an upload."""

    def __init__(self, url: str) -> None:
        self._port = httpx.URL(url).port

    async def __aenter__(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {LOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n"
        head += f"Content-Type: {FORM['content-type']}\r\n\r\n"
        self.writer.write(head.encode() + OPENED + b"weights")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()


def arriving(replica: Replica) -> bool:
    """True once the beginning of a file is on disk."""
    files = replica.directory.glob(f"adapters/.incoming-*/{TENSORS_FILE}")
    return any(file.stat().st_size for file in files)


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    async with live(replica.app) as url:
        async with Client(url):
            await until(lambda: arriving(replica))
        await until(lambda: not replica.kept())
    assert replica.names() == []


async def test_a_client_that_stalls_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_form, "PROGRESS_S", 0.3)
    replica = Replica(tmp_path)
    async with live(replica.app) as url, Client(url) as client:
        answer = await asyncio.wait_for(client.reader.read(), TIMEOUT_S)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body_too_slow" in answer
    assert replica.kept() == []


async def test_dripping_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_form, "PROGRESS_S", 0.3)
    replica = Replica(tmp_path)
    async with live(replica.app) as url, Client(url) as client:
        ended = asyncio.create_task(client.reader.read())
        while not ended.done():
            client.writer.write(b"x")
            await asyncio.wait({ended}, timeout=0.01)
        assert (await ended).startswith(b"HTTP/1.1 408 ")
    assert replica.kept() == []


async def test_an_upload_may_take_long_as_long_as_it_moves(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = asyncio.get_running_loop().time
    monkeypatch.setattr(upload_form, "PROGRESS_S", 5.0)
    monkeypatch.setattr(upload_form, "PROGRESS_BYTES", 1)
    late_s = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock() + late_s)
    replica = Replica(tmp_path)
    request = httpx.Request("POST", "http://x", data={"lora_name": "slow"}, files=parts(adapter))
    content = request.read()

    async def slow() -> AsyncIterator[bytes]:
        nonlocal late_s
        for start in range(0, len(content), 50):
            late_s += 3.0  # more than a minute in all
            await asyncio.sleep(0)
            yield content[start : start + 50]

    kind = {"content-type": request.headers["content-type"]}
    async with client_of(replica.app) as client:
        answer = await client.post(LOAD, content=slow(), headers=kind)
    assert answer.status_code == 200, answer.text
    assert late_s > 60


async def test_a_replica_that_stops_cuts_uploads_off(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    cut = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield OPENED + b"weights"
        await until(lambda: arriving(replica))
        replica.app.cut()
        await cut.wait()

    async with client_of(replica.app) as client:
        answer = await client.post(LOAD, content=body(), headers=FORM)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        late = await client.post(LOAD, content=b"", headers=FORM)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert replica.kept() == []


def test_what_a_killed_process_received_is_swept(tmp_path: Path, adapter: Path) -> None:
    replica = Replica(tmp_path)
    code = f"""
import os, signal
from cluster.store import Store
from cluster.uploads import Upload
upload = Upload(Store({str(replica.directory / "adapters")!r}, inspect=None))
upload.open({CONFIG_FILE!r})
upload.write(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=WORK_S)
    assert done.returncode == -9
    (left,) = replica.kept()
    assert left.startswith(".incoming-")
    answer = asyncio.run(replica.post(*parts(adapter), lora_name="mine"))
    assert answer.status_code == 200
    assert replica.kept() == [digest_of(replica, adapter)]


async def test_its_files_are_there_after_a_restart(tmp_path: Path, adapter: Path) -> None:
    first = Replica(tmp_path)
    assert (await first.post(*parts(adapter), lora_name="mine")).status_code == 200
    (version,) = first.catalog.versions()
    await first.catalog.stop()
    shutil.rmtree(adapter)
    again = Replica(tmp_path)
    await again.catalog.add("mine", version.uri, trusted=True)
    assert again.catalog.versions() == [version]


async def test_a_url_of_an_upload_is_a_path_like_any_other(tmp_path: Path, adapter: Path) -> None:
    replica = Replica(tmp_path, adapter_roots=(str(tmp_path),))
    await replica.post(*parts(adapter), lora_name="mine")
    (version,) = replica.catalog.versions()
    async with client_of(replica.app) as client:
        body = {"lora_name": "second", "lora_path": version.uri}
        answer = await client.post(LOAD, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        # Without keys: where changes are allowed, and never for a page, of whatever origin.
        (Rules(), {}, 200),
        (Rules(), {"origin": "http://evil.example"}, 403),
        (Rules(), {"origin": "http://localhost"}, 403),
        (Rules(), {"origin": "null"}, 403),
        (Rules(), {"host": "evil.example"}, 403),
        (Rules(hosts=("fleet.internal",)), {"host": "fleet.internal"}, 200),
        (Rules(changes=False), {}, 403),
        (Rules(changes=False, operator_key="sk-operator"), {}, 403),
        (
            Rules(changes=False, operator_key="sk-operator"),
            {"authorization": "Bearer sk-operator"},
            200,
        ),
        # With keys: an admin key, with adapter roots or without.
        (KEYS, {}, 401),
        (KEYS, {"authorization": "Bearer sk-use"}, 403),
        (KEYS, ADMIN, 200),
        (KEYS, ADMIN | {"origin": "http://evil.example", "host": "evil.example"}, 200),
        (KEYS, {"authorization": "Bearer sk-operator"}, 200),
    ],
)
async def test_who_may_upload(
    tmp_path: Path, adapter: Path, rules: Rules, headers: dict[str, str], status: int
) -> None:
    replica = Replica(tmp_path, replace(CONFIG, rules=rules))
    answer = await replica.post(*parts(adapter), lora_name="mine", headers=headers)
    assert answer.status_code == status, answer.text
    assert bool(replica.names()) == bool(replica.kept()) == (status == 200)


async def test_who_uploads_without_roots_may_remove_but_name_no_path(
    tmp_path: Path, adapter: Path
) -> None:
    replica = Replica(tmp_path, replace(CONFIG, rules=KEYS))
    assert (await replica.post(*parts(adapter), lora_name="a", headers=ADMIN)).status_code == 200
    async with client_of(replica.app) as client:
        path = {"lora_name": "b", "lora_path": str(adapter)}
        both = {"adapters": [path]}
        unload = {"lora_name": "a"}
        for route, body, status in (
            ("load_lora_adapter", path, 403),
            ("load_lora_adapters", both, 403),
            ("unload_lora_adapter", unload, 200),
        ):
            answer = await client.post(f"/v1/{route}", json=body, headers=ADMIN)
            assert answer.status_code == status, answer.text
        form = await client.post("/v1/unload_lora_adapter", data=unload, headers=ADMIN)
        assert form.status_code == 415
    assert replica.names() == []


async def test_a_refused_caller_sends_no_files(tmp_path: Path) -> None:
    replica = Replica(tmp_path, replace(CONFIG, rules=KEYS))
    asked = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal asked
        asked += 1
        yield OPENED

    async with client_of(replica.app) as client:
        for headers in ({}, {"authorization": "Bearer sk-use"}):
            await client.post(LOAD, content=body(), headers=FORM | headers)
    assert asked == 0
    assert not replica.directory.exists()


def test_what_is_closed_meanwhile_begins_no_directory(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    upload: Upload = replica.catalog.upload()
    upload.close()
    with pytest.raises(AssertionError):
        upload.open(CONFIG_FILE)
    assert replica.kept() == []
