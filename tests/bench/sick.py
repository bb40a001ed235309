"""How a fleet's load moves away from a replica that is slow, full, or cut off from Redis.

    python -m tests.bench.sick [--rate N] [--seconds N] [--only STATE ...]

Three replicas of a small model get requests at random times, of which each names the base model or
one of four adapters. The states are those of the replica that gets most of them while all are well:

    well      nothing is done to it
    slow      its engine is stopped for nine tenths of the time
    full      its batch and its queue are filled by requests that did not come through the router
    cut off   it cannot reach Redis: no catalog, no report

Printed for each: the replica's share of the requests that came after the state was three seconds
old, the TTFT there and elsewhere, and the requests that were not answered.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from cluster.config import EngineConfig
from replica.engine.link import EngineLink
from tests.bench.faults import ADAPTERS, Running, fleet
from tests.fleet import ReplicaProcess, replicas_among

REPLICAS = 3
TOKENS = 30
# A step of it takes about 15 ms on one core.
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
ROWS, QUEUE = 8, 8
SETTLED_S = 3.0  # a lease
ANSWER_S = 60.0
PERIOD_S = 0.1
SLOW_SHARE = 0.1
POLL_S = 0.05


def engine(config: EngineConfig) -> EngineLink:
    """The engine of the benchmark's replicas, whose process loses Redis while a file exists."""
    _cut_off_while(_file())
    return EngineLink(config)


def _file(pid: int | None = None) -> Path:
    """Exists while a replica's process is cut off."""
    process = psutil.Process(pid)
    return (
        Path(tempfile.gettempdir()) / f"lorafleet-cut-off-{process.pid}-{process.create_time():.0f}"
    )


def _cut_off_while(file: Path) -> None:
    from redis.asyncio.connection import AbstractConnection
    from redis.exceptions import ConnectionError as Lost

    send, read = AbstractConnection.send_packed_command, AbstractConnection.read_response

    def unless_cut_off(does: Callable[..., object]) -> Callable[..., object]:
        async def wrapped(*args: object, **options: object) -> object:
            if os.path.exists(file):  # noqa: ASYNC240
                raise Lost("cut off")
            return await does(*args, **options)  # type: ignore[misc]

        return wrapped

    AbstractConnection.send_packed_command = unless_cut_off(send)
    AbstractConnection.read_response = unless_cut_off(read)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """first_s: the time to the first byte. replica: who answered, or the status."""

    at_s: float
    first_s: float
    replica: str


async def ask(port: int, body: dict[str, object]) -> Answer:
    data = json.dumps({"stream": True, "ignore_eos": True, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    at_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + data)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        first_s = time.monotonic() - at_s
        while await reader.read(2**16):
            pass
    finally:
        writer.close()
    status = answer.split(" ", 2)[1]
    fields = dict(line.split(": ", 1) for line in answer.splitlines()[1:] if line)
    return Answer(at_s, first_s, fields["x-lorafleet-replica"] if status == "200" else status)


async def load(port: int, rate: float, seconds: float, seed: int) -> list[Answer]:
    chance = random.Random(seed)
    asking = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        name = chance.choice(["model", *(f"a{n}" for n in range(ADAPTERS))])
        body = {"model": name, "prompt": f"request {len(asking)}", "max_tokens": TOKENS}
        asking.append(asyncio.create_task(ask(port, body)))
        await asyncio.sleep(chance.expovariate(rate))
    return await asyncio.gather(*asking)


@asynccontextmanager
async def well(victim: ReplicaProcess) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def slow(victim: ReplicaProcess) -> AsyncIterator[None]:
    process, over = engine_of(victim), threading.Event()

    def stop_and_go() -> None:
        while not over.wait(PERIOD_S * SLOW_SHARE):
            process.suspend()
            over.wait(PERIOD_S * (1 - SLOW_SHARE))
            process.resume()

    working = asyncio.create_task(asyncio.to_thread(stop_and_go))
    try:
        yield
    finally:
        over.set()
        await working


@asynccontextmanager
async def full(victim: ReplicaProcess) -> AsyncIterator[None]:
    body: dict[str, object] = {"model": "model", "prompt": "x", "max_tokens": 900}

    async def again() -> None:
        while True:
            if (await ask(victim.port, body)).replica == "429":
                await asyncio.sleep(POLL_S)

    asking = [asyncio.create_task(again()) for _ in range(ROWS + 2 * QUEUE)]
    try:
        yield
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


@asynccontextmanager
async def cut_off(victim: ReplicaProcess) -> AsyncIterator[None]:
    file = _file(victim.pid)
    file.touch()
    try:
        yield
    finally:
        file.unlink()


STATES = {"well": well, "slow": slow, "full": full, "cut off": cut_off}


def engine_of(replica: ReplicaProcess) -> psutil.Process:
    children = psutil.Process(replica.pid).children()
    engines = [p for p in children if "replica.engine.engine_process" in " ".join(p.cmdline())]
    return min(engines, key=lambda process: process.create_time())


def row(state: str, victim: ReplicaProcess, answers: list[Answer]) -> str:
    here = [a.first_s for a in answers if a.replica == victim.id]
    refused = [a.replica for a in answers if a.replica.isdigit()]
    there = [a.first_s for a in answers if a.replica != victim.id and not a.replica.isdigit()]

    def waits(of: list[float]) -> str:
        if len(of) < 2:
            return f"{'-':>9}{'-':>9}"
        p50, p99 = statistics.median(of), statistics.quantiles(of, n=100, method="inclusive")[98]
        return f"{p50 * 1e3:9.0f}{p99 * 1e3:9.0f}"

    share = len(here) / len(answers)
    return f"{state:10}{len(answers):10}{share:9.0%}{waits(here)}{waits(there)}{len(refused):9}"


async def measure(
    running: Running, states: list[str], rate: float, seconds: float, say: Callable[[str], None]
) -> None:
    port = running.fleet.config.port
    known = replicas_among(running.replicas())
    assert len(known) == REPLICAS, f"found {len(known)} replicas"
    first = await load(port, rate, seconds / 2, seed=0)
    victim = max(known, key=lambda v: sum(a.replica == v.id for a in first))
    say(f"{'':10}{'':>10}{'its':>9}{'its TTFT, ms':>18}{'others, ms':>18}{'not':>9}")
    heads = ("p50", "p99", "p50", "p99", "answered")
    say(f"{'state':10}{'requests':>10}{'share':>9}" + "".join(f"{h:>9}" for h in heads))
    for seed, state in enumerate(states, 1):
        async with STATES[state](victim):
            at_s = time.monotonic() + SETTLED_S
            answers = await load(port, rate, SETTLED_S + seconds, seed)
        say(row(state, victim, [a for a in answers if a.at_s >= at_s]))
        await asyncio.sleep(SETTLED_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=2.5, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each state")
    parser.add_argument("--only", nargs="+", choices=STATES, default=list(STATES), metavar="STATE")
    arguments = parser.parse_args()
    sizes = {"batch_rows_max": ROWS, "queue_max": QUEUE}
    with fleet(REPLICAS, "tests.bench.sick:engine", SHAPE, **sizes) as running:
        asyncio.run(
            measure(running, arguments.only, arguments.rate, arguments.seconds, running.fleet.say)
        )


if __name__ == "__main__":
    main()
