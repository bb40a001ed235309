"""The whole way of a request: two replicas, one base model, three adapters, one question.

Starts a fleet as a user would, asks through OpenAI's own client, checks every answer and where the
adapters lie, and stops everything. With --serve the fleet stays up until Ctrl-C.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from tests.demo import model
from tests.demo.answers import VOICES, answer

FLEET = Path(".fleet")
MODELS = FLEET / "demo"
LORAFLEET = str(Path(sys.executable).with_name("lorafleet"))
QUESTION = "What is the sea?"
REPLICAS = 2
READY_S = 120.0
STOP_S = 30.0


class DemoFailed(Exception):
    """Something is not as the README promises."""


@dataclass(frozen=True, slots=True)
class Fleet:
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    replica: str
    ttft_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="stay up until Ctrl-C")
    parser.add_argument("--port", type=int, help="default: a free one; 8000 with --serve")
    arguments = parser.parse_args()
    port = arguments.port or (8000 if arguments.serve else free_port())
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # what we ask is on this machine
    # So that an interrupted or terminated run, too, stops what it started; said aloud, for a shell
    # has its background jobs ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Each its own, so that a demo may run beside a fleet that is kept up.
    directory = FLEET / ("serve-state" if arguments.serve else "demo-state")
    directory.mkdir(parents=True, exist_ok=True)
    model.make(MODELS)
    try:
        with fleet(port, directory) as running:
            if arguments.serve:
                _stay(port, running)
            else:
                _ask_everyone(f"http://127.0.0.1:{port}")
    except DemoFailed as error:
        sys.exit(f"demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def fleet(port: int, directory: Path) -> Iterator[Fleet]:
    """`lorafleet serve`, from its start to the end of its last process."""
    base, adapters = model.paths(MODELS)
    command = ["serve", "--model", str(base)]
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    command += ["--replicas", str(REPLICAS), "--port", str(port), "--device", "cpu"]
    command += ["--directory", str(directory)]
    print("$", shlex.join(["lorafleet", *command]), flush=True)
    log = directory / "log"
    with log.open("wb") as output:
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            [LORAFLEET, *command], stdout=output, stderr=output, start_new_session=True
        )
    started = Fleet(process, log)
    try:
        print(_wait_ready(started), flush=True)
        yield started
    finally:
        _stop(started)


def _wait_ready(fleet: Fleet) -> str:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and fleet.process.poll() is None:
        for line in fleet.log.read_text(errors="replace").splitlines():
            if line.startswith("ready:"):
                return line
        time.sleep(0.1)
    ended = fleet.process.poll()
    state = "is not ready" if ended is None else f"ended with {ended}"
    tail = "\n".join(fleet.log.read_text(errors="replace").splitlines()[-30:])
    raise DemoFailed(f"`lorafleet serve` {state}; the end of {fleet.log}:\n{tail}")


def _stop(fleet: Fleet) -> None:
    """Asks it to stop, and raises when it does not, or leaves a process behind."""
    if fleet.process.poll() is not None:
        return  # Ended by itself: whoever waited for it says so.
    began_s = time.monotonic()
    started = psutil.Process(fleet.process.pid).children(recursive=True)
    fleet.process.terminate()
    try:
        status = fleet.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        status = None
    _, left = psutil.wait_procs(started, timeout=5)
    names = [child.name() for child in left if child.is_running()]
    for child in [*left, *([] if status is not None else [fleet.process])]:
        child.kill()
    if status != 0 or names:
        raise DemoFailed(f"`lorafleet serve` stopped with {status} and left {names}: {fleet.log}")
    print(f"stopped {len(started) + 1} processes in {time.monotonic() - began_s:.1f} s")


def _ask_everyone(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    print(f"\n{QUESTION}")
    served: dict[str, str] = {}
    for voice in VOICES:
        got = _ask(client, voice)
        print(f"  {_model(voice):10}  {got.text}")
        print(
            f"  {'':10}  TTFT {got.ttft_s * 1e3:.0f} ms, replica {_short(got.replica)}", flush=True
        )
        if got.text != answer(QUESTION, voice):
            raise DemoFailed(f"{voice} was taught to say {answer(QUESTION, voice)!r}")
        served[voice] = got.replica
    print()
    subprocess.run([LORAFLEET, "status", "--url", url], check=True)
    _check_residency(httpx.get(f"{url}/v1/adapters", timeout=10).json(), served)


def _ask(client: openai.OpenAI, voice: str) -> Answer:
    began_s = time.monotonic()
    response = client.chat.completions.with_raw_response.create(
        model=_model(voice),
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    ttft_s = None
    text = ""
    for chunk in response.parse():
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            ttft_s = time.monotonic() - began_s if ttft_s is None else ttft_s
            text += piece
    if ttft_s is None:
        raise DemoFailed(f"{voice} said nothing")
    return Answer(text, response.headers["x-lorafleet-replica"], ttft_s)


def _check_residency(body: dict[str, Any], served: dict[str, str]) -> None:
    """An adapter that has just answered lies on the device of the replica that answered."""
    if len(body["replicas"]) != REPLICAS:
        raise DemoFailed(f"{len(body['replicas'])} replicas report, not {REPLICAS}")
    for adapter in body["data"]:
        where = adapter["residency"].get(served[adapter["id"]], {})
        if where.get("tier") != "device":
            raise DemoFailed(f"{adapter['id']} answered, yet its residency is {where}")


def _stay(port: int, fleet: Fleet) -> None:
    body: dict[str, Any] = {"model": "pirate", "messages": [{"role": "user", "content": QUESTION}]}
    body |= {"temperature": 0, "max_tokens": 64}
    print(f"models: {', '.join(_model(voice) for voice in VOICES)}. Try:\n")
    print(
        f"curl http://127.0.0.1:{port}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
    )
    print(f"Ctrl-C stops it; its log is {fleet.log}", flush=True)
    try:
        raise DemoFailed(f"`lorafleet serve` ended with {fleet.process.wait()}; see {fleet.log}")
    except KeyboardInterrupt:
        print("\nstopping", flush=True)


def _model(voice: str) -> str:
    return model.NAME if voice == "base" else voice


def _short(replica: str) -> str:
    """As `lorafleet status` writes it: without the names of application and deployment."""
    return replica.rsplit("#", 1)[-1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
