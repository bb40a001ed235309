"""A fleet for tests: started with the real command line, observed from outside."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

LORAFLEET = str(Path(sys.executable).with_name("lorafleet"))
# These only end a hang. On a busy machine, everything takes many times as long.
START_S = 300.0
STOP_S = 60.0
ANSWER_S = 60.0


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = ANSWER_S) -> Any:
    """Polls `condition` and returns its first true value. Fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class ReplicaProcess:
    """One replica's server: the process, its port and its id in the fleet."""

    pid: int
    port: int
    id: str

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=ANSWER_S).text
        return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.M)}


def replicas_among(processes: Iterable[psutil.Process]) -> list[ReplicaProcess]:
    """The replicas' servers, sorted by id. Serve does not report their ports."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if not title.startswith("ray::ServeReplica:default:replica"):
                continue
            for connection in process.net_connections("tcp"):
                replica_id = None
                if connection.status == psutil.CONN_LISTEN:
                    replica_id = _replica_at(connection.laddr.port)
                if replica_id:
                    found.append(ReplicaProcess(process.pid, connection.laddr.port, replica_id))
    return sorted(found, key=lambda replica: replica.id)


class Fleet:
    """`lorafleet serve` and the processes that it has started."""

    def __init__(self, arguments: Sequence[str], directory: Path) -> None:
        self.log = directory / "fleet.log"
        self.directory = directory / "fleet"
        command = [LORAFLEET, "serve", "--port", "0", "--directory", str(self.directory)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=log, stderr=log, start_new_session=True
            )
        self.url = ""

    def wait_ready(self) -> None:
        def ready() -> re.Match[str] | None:
            assert self.process.poll() is None, f"it ended: {self.output()}"
            return re.search(r"^ready: (http\S+)/v1$", self.output(), re.M)

        self.url = eventually(ready, "the fleet is ready", START_S)[1]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[ReplicaProcess]:
        return replicas_among(self.processes())

    def adapters(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/v1/adapters", timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    def complete(self, model: str, max_tokens: int = 4, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": max_tokens, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=ANSWER_S)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float, list[str]]:
        """Stops the fleet. Returns the exit status, the seconds it took, and the command lines of
        the processes that it left running.
        """
        started = self.processes() if self.process.poll() is None else []
        start_s = time.monotonic()
        self.process.send_signal(number)
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        took_s = time.monotonic() - start_s
        _, left = psutil.wait_procs(started, timeout=STOP_S)
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline()) or process.name())
                process.kill()
        return status, took_s, names


@contextlib.contextmanager
def fleet(arguments: Sequence[str], directory: Path) -> Iterator[Fleet]:
    running = Fleet(arguments, directory)
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


@contextlib.contextmanager
def replica(
    model: Path | str,
    arguments: Sequence[str],
    log: Path,
    program: str = LORAFLEET,
    directory: Path | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """`lorafleet replica`, run in `directory`: its process, its URL, and what it has written."""
    command = [program, "replica", "--model", str(model), "--port", "0", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(), cwd=directory
        )

    def ready() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r"^ready: (http\S+)/v1$", log.read_text(), re.M)

    try:
        yield process, eventually(ready, "the replica is ready", START_S)[1], log
    finally:
        process.kill()
        process.wait()


def _replica_at(port: int) -> str | None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        client.request("GET", "/health")
        return client.getresponse().headers.get("x-lorafleet-replica")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        client.close()


def environment() -> dict[str, str]:
    """The environment without the settings of lorafleet and Ray in a developer's shell."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("LORAFLEET_", "RAY_"))}
