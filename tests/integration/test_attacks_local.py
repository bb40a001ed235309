"""A local fleet under attack: by other users of the machine, by clients without a key, by one with
another's.
"""

import asyncio
import contextlib
import math
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import attacks
from tests.fleet import ANSWER_S, Fleet, eventually, fleet
from tests.models import make_adapter, make_model
from tests.raw_http import exchange
from tests.until import until

pytestmark = pytest.mark.ray

KEY, OTHER, ADMIN = "sk-alpha,beta", "sk-other", "sk-admin"
SOURCE_MAX = 60
NOBODY = 65534


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "tiny", max_position_embeddings=4096)
    for name in ("one", "two"):
        make_adapter(root / "adapters" / name, model)
    return root


@pytest.fixture(scope="module")
def running(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    config = directory / "fleet.yaml"
    config.write_text(
        f"api_keys: ['{KEY}', {OTHER}]\nadmin_keys: [{ADMIN}]\nadapter_roots: [{files}/adapters]\n"
        f"source_connections_max: {SOURCE_MAX}\n"
    )
    config.chmod(0o600)
    arguments = ["--model", str(files / "tiny"), "--device", "cpu", "--config", str(config)]
    with fleet([*arguments, "--adapter", f"one={files}/adapters/one"], directory) as started:
        yield started


def port_of(running: Fleet) -> int:
    port = httpx.URL(running.url).port
    assert port is not None
    return port


def run_directory(running: Fleet) -> Path:
    """Where its sockets and Ray's files are."""
    environments = (process.environ() for process in running.processes())
    return Path(next(e["LORAFLEET_RUN"] for e in environments if e.get("LORAFLEET_RUN")))


def files_of(running: Fleet) -> list[Path]:
    roots = [run_directory(running), running.directory]
    return [path for root in roots for path in [root, *root.rglob("*")]]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_open_no_file_and_no_socket(running: Fleet) -> None:
    paths = files_of(running)
    assert any(path.is_socket() for path in paths) and len(paths) > 50
    script = "while read -r path; do for how in r w x; do"
    script += ' [ -$how "$path" ] && echo "$how $path"; done; done; exit 0'
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        input="\n".join([*map(str, paths), ""]),
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    assert done.stdout == ""


def test_its_directories_are_closed_to_others(running: Fleet) -> None:
    for directory in (run_directory(running), running.directory):
        assert directory.stat().st_mode & 0o777 == 0o700
    for path in running.directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file
            assert path.lstat().st_mode & 0o077 == 0 or path.is_symlink(), path


def test_every_port_listens_on_this_machine_only(running: Fleet) -> None:
    wide = []
    for process in [psutil.Process(running.process.pid), *running.processes()]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just been replaced
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    ip = connection.laddr.ip.removeprefix("::ffff:")
                    if ip not in ("127.0.0.1", "::1"):
                        wide.append((process.name(), connection.laddr))
    assert wide == []


def test_its_token_for_ray_is_its_own(running: Fleet) -> None:
    directory = run_directory(running)
    (token,) = [path for path in files_of(running) if path.name == "ray.token"]
    assert token.parent == directory and token.stat().st_mode & 0o777 == 0o600
    environments = [
        p.environ() for p in running.processes() if p.name() in ("raylet", "gcs_server")
    ]
    assert [e["RAY_AUTH_TOKEN_PATH"] for e in environments] == [str(token)] * 2
    assert {e["RAY_AUTH_MODE"] for e in environments} == {"token"}


def test_haproxy_knows_no_key_and_no_command_line_does(running: Fleet) -> None:
    (path,) = [path for path in files_of(running) if path.name == "admin.sock"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"show env\n")
        told = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    assert "LORAFLEET_RUN" in told
    assert not any(name in told for name in ("KEY", "TOKEN", "REDIS", "PASSWORD"))
    lines = [" ".join(process.cmdline()) for process in running.processes()]
    assert not any(key in line for line in lines for key in (KEY, OTHER, ADMIN))


def test_keys_are_taken_whole(running: Fleet) -> None:
    for key, status in ((KEY, 200), ("sk-alpha", 401), ("beta", 401), (None, 401)):
        answer = httpx.get(f"{running.url}/v1/models", headers=bearer(key), timeout=ANSWER_S)
        assert answer.status_code == status, key


def test_what_a_key_may_not_do(running: Fleet, files: Path) -> None:
    """A second client's key: what of the fleet, and of the first client, it gets to see."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "a secret prompt " * 8, "max_tokens": 1}
    url = f"{running.url}/v1/completions"
    first = httpx.post(url, json=ask, headers=bearer(KEY), timeout=ANSWER_S)
    again = httpx.post(url, json=ask, headers=bearer(KEY), timeout=ANSWER_S)
    other = httpx.post(url, json=ask, headers=bearer(OTHER), timeout=ANSWER_S)
    cached = [
        (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        for answer in (first, again, other)
    ]
    assert cached[1] > 0 == cached[2]
    timeline = f"/v1/requests/{first.json()['id']}"
    new = {"lora_name": "two", "lora_path": f"{files}/adapters/two"}
    tried = {
        ("GET", timeline, None): 404,
        ("GET", "/v1/adapters", None): 403,
        ("GET", "/metrics", None): 403,
        ("POST", "/v1/load_lora_adapter", str(new)): 403,
        ("POST", "/v1/load_lora_adapters", str(new)): 403,
        ("POST", "/v1/unload_lora_adapter", '{"lora_name": "one"}'): 403,
    }
    for (method, path, body), status in tried.items():
        answer = httpx.request(
            method,
            running.url + path,
            content=body,
            headers=bearer(OTHER) | {"content-type": "application/json"},
            timeout=ANSWER_S,
        )
        assert answer.status_code == status, (path, answer.text)
        assert str(files) not in answer.text
    own = httpx.get(running.url + timeline, headers=bearer(KEY), timeout=ANSWER_S)
    assert own.status_code == 200


@pytest.mark.parametrize("name", ["Tiny", "ti\u043dy", "\uff54\uff49\uff4e\uff59"])
def test_names_that_read_like_the_bases_are_refused(running: Fleet, files: Path, name: str) -> None:
    body = {"lora_name": name, "lora_path": f"{files}/adapters/two"}
    answer = httpx.post(
        f"{running.url}/v1/load_lora_adapter", json=body, headers=bearer(ADMIN), timeout=ANSWER_S
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")


async def test_a_websocket_is_refused_at_the_door(running: Fleet) -> None:
    for method in ("GET", "POST"):
        request = f"{method} /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        request += "Connection: Upgrade\r\nContent-Length: 2\r\n\r\n{}"
        answer = await exchange(port_of(running), request.encode())
        assert answer.startswith(b"HTTP/1.1 400"), answer


async def test_http_2_is_refused_at_the_door(running: Fleet) -> None:
    """Its streams would count as one connection."""
    answer = await exchange(port_of(running), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400"), answer


async def test_a_target_that_is_no_path_is_the_clients_fault(running: Fleet) -> None:
    answer = await exchange(port_of(running), b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400") and b'"code":"invalid_value"' in answer, answer


async def test_an_answer_has_one_request_id_of_our_pattern(running: Fleet) -> None:
    for given, kept in (
        (b"x-request-id: mine-1\r\n", True),
        (b"x-request-id: a\x80b\r\n", False),
        (b"x-request-id: a b\r\n", False),
        (b"x-request-id: " + b"x" * 129 + b"\r\n", False),
        (b"x-request-id: one\r\nx-request-id: two\r\n", False),
        (b"", False),
    ):
        head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + given
        head += f"Authorization: Bearer {ADMIN}\r\n\r\n".encode()
        answer = await exchange(port_of(running), head)
        ids = [
            line.partition(b": ")[2]
            for line in answer.split(b"\r\n\r\n")[0].lower().split(b"\r\n")
            if line.startswith(b"x-request-id: ")
        ]
        assert answer.startswith(b"HTTP/1.1 200") and len(ids) == 1, answer
        assert (ids[0] in given and bool(given)) == kept, answer


async def test_a_header_that_can_name_no_model_is_passed_over(running: Fleet) -> None:
    body = b'{"model": "one", "prompt": "x", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    for value in (b"\x88", "schön".encode(), b"\x1a"):
        named = head.encode() + b"x-lorafleet-model: " + value + b"\r\n\r\n"
        answer = await exchange(port_of(running), named + body)
        assert answer.startswith(b"HTTP/1.1 200"), (value, answer)


@pytest.mark.parametrize("kind", sorted(attacks.HELD))
async def test_connections_that_are_held_keep_nobody_out(running: Fleet, kind: str) -> None:
    """One address gets no more than its share, and what it holds without asking is taken away."""
    port = port_of(running)

    def haproxies() -> list[psutil.Process]:
        return [process for process in running.processes() if name_of(process) == "haproxy"]

    def descriptors() -> float:
        """HAProxy's. Infinite while one replaces another, since the targets have changed."""
        found = haproxies()
        with contextlib.suppress(psutil.NoSuchProcess):
            return found[0].num_fds() if len(found) == 1 else math.inf
        return math.inf

    # The first one does not know the router yet, and keeps its connections when it is replaced.
    await until(lambda: len(haproxies()) == 1 and b"ingress-request-router" in backends(running))
    for _ in range(3):  # opens what HAProxy keeps open to replicas and routers
        await attacks.first_token_s(port, KEY)
    before = descriptors()
    async with attacks.held(port, kind, 3 * SOURCE_MAX, "127.0.0.2") as connections:
        await until(lambda: connections.closed() + connections.refused >= 2 * SOURCE_MAX)
        for _ in range(3):
            await attacks.first_token_s(port, KEY)
        await until(lambda: connections.closed() == len(connections.open))
    await until(lambda: descriptors() <= before + 4)
    await attacks.first_token_s(port, KEY)


def backends(running: Fleet) -> bytes:
    """Of the HAProxy that takes new connections."""
    (admin,) = run_directory(running).glob("**/admin.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(admin))
        connection.sendall(b"show backend\n")
        return connection.recv(2**16)


def name_of(process: psutil.Process) -> str:
    """Empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name())
    return ""


def load(running: Fleet) -> dict[str, int]:
    page = httpx.get(f"{running.url}/v1/adapters", headers=bearer(ADMIN), timeout=ANSWER_S).json()
    (entry,) = page["replicas"]
    return dict(entry["load"])


def idle(running: Fleet) -> bool:
    found = load(running)
    return found["running"] == found["waiting"] == 0


async def test_streams_that_clients_leave_anywhere_leave_nothing(running: Fleet, seed: int) -> None:
    await attacks.disconnects(port_of(running), KEY, 150, seed)

    def empty() -> bool:
        found = load(running)
        return idle(running) and found["free_pages"] == found["capacity_pages"]

    await asyncio.to_thread(eventually, empty, "the engine is empty, and all pages are free")


def test_whatever_is_sent_the_answer_is_no_500(running: Fleet) -> None:
    found = attacks.mutations(port_of(running), ADMIN, 150)
    assert found[200] and found[400]
    eventually(lambda: idle(running), "the engine is empty")
