"""What clients of a fleet lose when a part of it dies, hangs, leaves or is replaced.

    python -m tests.bench.faults [--only FAULT ...] [--rounds N] [--clients N] [--json]

A fleet of two replicas of a tiny model streams to 64 clients, each of which asks again at once. One
fault a round, and 20 rounds of what takes seconds; all of it takes about 25 minutes on two cores:

    lost      requests that ended without a byte of an answer, or with an error status
    refused   connections that nobody took
    cut       streams that broke off without a word; with an error event: `told`
    TTFT      the longest wait for a first byte, in seconds
    whole     seconds from the fault until all replicas and routers serve again: median, longest
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import redis

from cluster.config import EngineConfig, FleetConfig
from router.local import APPLICATION, ENGINE, LocalFleet
from tests.models import make_adapter, make_model

ADAPTERS = 4
TOKENS = 100
CALM_S = 2.0
WHOLE_S = 120.0
AFTER_S = 2.0
ANSWER_S = 120.0
REDIS_STEPS = 20
END = b"0\r\n\r\n"


@dataclasses.dataclass(slots=True)
class Outcome:
    """Of one request. status: None if there was no answer. at_s: its start."""

    at_s: float
    first_s: float | None = None
    status: int | None = None
    done: bool = False
    told: bool = False
    refused: bool = False
    said: str = ""

    @property
    def kind(self) -> str:
        if self.refused:
            return "refused"
        if self.status != 200:
            return "lost"
        if self.done:
            return "whole"
        return "told" if self.told else "cut"


# Of requests: equal ones that engines end under would be refused in the end.
_numbers = itertools.count()


class Clients:
    """Streams that are asked for again and again. Each prompt is asked for once."""

    def __init__(self, port: int, count: int) -> None:
        self._port = port
        self._over = False
        self.outcomes: list[Outcome] = []
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(count)]

    async def stop(self) -> None:
        """Lets those that run end: what hangs counts as lost."""
        self._over = True
        await asyncio.gather(*self._tasks)

    async def _ask_on(self) -> None:
        while not self._over:
            outcome = Outcome(time.monotonic())
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self._ask(outcome)
            except TimeoutError:
                outcome.said = f"nothing within {ANSWER_S:.0f} s"
            except ConnectionRefusedError:
                outcome.refused = True
            except OSError as error:
                outcome.said = type(error).__name__
            self.outcomes.append(outcome)
            if outcome.kind in ("lost", "refused"):
                await asyncio.sleep(0.05)  # as a client's retry would

    async def _ask(self, outcome: Outcome) -> None:
        number = next(_numbers)
        names = ["model", *(f"a{n}" for n in range(ADAPTERS))]
        body = {"model": names[number % len(names)], "prompt": f"request {number}", "stream": True}
        body |= {"max_tokens": TOKENS, "ignore_eos": True}
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n")
            writer.write(
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
            )
            writer.write(data)
            tail = b""
            while part := await reader.read(2**16):
                if outcome.status is None:
                    outcome.first_s = time.monotonic() - outcome.at_s
                    outcome.status = int(part.split(b" ", 2)[1])
                tail = (tail + part)[-4096:]
            outcome.done = b"data: [DONE]" in tail
            outcome.told = b'"error"' in tail
            if not outcome.done:
                outcome.said = tail[-300:].decode(errors="replace")
        finally:
            writer.close()


class Running:
    """The fleet under test, and its processes."""

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet = fleet
        self._engine = fleet._engine_config()  # what the replicas were started with

    def find(self, start: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if start in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def replicas(self) -> list[psutil.Process]:
        return self.find("ray::ServeReplica:default:replica")

    def engines(self) -> list[psutil.Process]:
        return self.find("replica.engine.engine_process")

    def routers(self) -> list[psutil.Process]:
        return self.find("ray::ServeReplica:default:router")

    def started(self) -> dict[str, int]:
        """How many replicas of each deployment run, as Serve's controller has it."""
        from ray import serve

        try:
            deployments = serve.status().applications[APPLICATION].deployments
        except Exception:  # there is no controller now
            return {}
        return {name: each.replica_states.get("RUNNING", 0) for name, each in deployments.items()}

    def serving(self) -> dict[str, int]:
        """The replicas that report and do not stall: incarnation → steps of its engine."""
        url = f"{self.fleet.url}/v1/adapters"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                page = json.load(answer)
        except (OSError, ValueError):
            return {}
        loads = {r["incarnation"]: r["load"] for r in page["replicas"]}
        return {name: load["steps"] for name, load in loads.items() if not load["stalled"]}

    def redeploy(self, config: FleetConfig) -> None:
        from ray import serve

        from router.app import compose

        self.fleet.config = config
        bare = dataclasses.replace(config, redis_url=None, api_keys=(), engine=self._engine)
        serve.run(compose(bare), name=APPLICATION)


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def kill(processes: list[psutil.Process], number: int = signal.SIGKILL) -> list[psutil.Process]:
    processes[0].send_signal(number)
    return processes[:1]


def empty_redis(running: Running) -> list[psutil.Process]:
    """Kills the embedded Redis and takes its data."""
    directory = Path(running.fleet.config.directory) / "redis"
    (server,) = [p for p in running.find("redis-server") if p.name().startswith("redis-server")]
    server.suspend()
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix in (".rdb", ".aof", ".manifest"):
            path.unlink()
    server.kill()
    return [server]


def slow_redis(running: Running) -> list[psutil.Process]:
    """Each answer takes 200 ms for a while."""
    busy = "local t = redis.call('TIME'); local e = t[1] * 1e6 + t[2] + 2e5 repeat "
    busy += "t = redis.call('TIME') until t[1] * 1e6 + t[2] > e"
    assert running.fleet._redis is not None
    with redis.Redis.from_url(running.fleet._redis.url) as client:
        for _ in range(REDIS_STEPS):
            client.eval(busy, 0)
    return []


def scale(running: Running, count: int) -> list[psutil.Process]:
    running.redeploy(dataclasses.replace(running.fleet.config, replicas=count))
    return []


def down_and_up(running: Running) -> list[psutil.Process]:
    return [*scale(running, 1), *scale(running, 2)]


def roll(running: Running) -> list[psutil.Process]:
    config, before = running.fleet.config, running.engines()
    running.redeploy(dataclasses.replace(config, drain_s=config.drain_s + 1))
    return before


Fault = Callable[[Running], list[psutil.Process]]

REPLICAS = 2

# What is done, which returns the processes that end by it; how many replicas or engines are new
# afterwards; how many rounds.
FAULTS: dict[str, tuple[Fault, int, int]] = {
    "kill-engine": (lambda r: kill(r.engines()), 1, 20),
    "stop-engine": (lambda r: kill(r.engines(), signal.SIGSTOP), 1, 20),
    "kill-replica": (lambda r: kill(r.replicas()), 1, 10),
    "kill-router": (lambda r: kill(r.routers()), 0, 20),
    "kill-controller": (lambda r: kill(r.find("ray::ServeController")), 0, 20),
    "kill-haproxy": (lambda r: kill(r.find("haproxy -db")), 0, 20),
    "empty-redis": (empty_redis, 0, 20),
    "slow-redis": (slow_redis, 0, 10),
    "redeploy-same": (lambda r: scale(r, REPLICAS), 0, 20),
    "scale-2-1-2": (down_and_up, 1, 5),
    "redeploy": (roll, REPLICAS, 5),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    lost: int
    refused: int
    cut: int
    told: int
    ttft_s: float
    whole_s: float
    requests: int
    said: dict[str, int]


async def run(running: Running, name: str, clients: int) -> Round:
    fault, new, _ = FAULTS[name]
    routers = len(running.routers())

    def whole() -> bool:
        if any(map(runs, hit)) or len(running.routers()) < routers:
            return False
        now = running.serving()
        fresh = [name for name, steps in now.items() if steps < before.get(name, math.inf)]
        if len(now) != REPLICAS or len(fresh) < new:
            return False
        return running.started() == {"replica": REPLICAS, "router": routers}

    asking = Clients(running.fleet.config.port, clients)
    try:
        await asyncio.sleep(CALM_S)
        before = await asyncio.to_thread(running.serving)
        at_s = time.monotonic()
        hit = await asyncio.to_thread(fault, running)
        while time.monotonic() < at_s + WHOLE_S:
            if await asyncio.to_thread(whole):
                break
            await asyncio.sleep(0.1)
        whole_s = time.monotonic() - at_s
        await asyncio.sleep(AFTER_S)
    finally:
        await asking.stop()
    counts = collections.Counter(outcome.kind for outcome in asking.outcomes)
    waits = [outcome.first_s for outcome in asking.outcomes if outcome.first_s is not None]
    said = collections.Counter(
        f"{o.status}: {o.said.strip()[-160:]}" for o in asking.outcomes if o.kind != "whole"
    )
    return Round(
        lost=counts["lost"],
        refused=counts["refused"],
        cut=counts["cut"],
        told=counts["told"],
        ttft_s=max(waits, default=0.0),
        whole_s=whole_s,
        requests=len(asking.outcomes),
        said=dict(said.most_common(4)),
    )


def row(name: str, rounds: list[Round]) -> str:
    total = [sum(getattr(r, field) for r in rounds) for field in ("lost", "refused", "cut", "told")]
    whole = [r.whole_s for r in rounds]
    return (
        f"{name:16}{len(rounds):7}{sum(r.requests for r in rounds):10}"
        + "".join(f"{count:9}" for count in total)
        + f"{max(r.ttft_s for r in rounds):9.1f}{statistics.median(whole):9.1f}{max(whole):9.1f}"
    )


@contextlib.contextmanager
def fleet(
    replicas: int = REPLICAS,
    engine: str = ENGINE,
    shape: Mapping[str, int] = MappingProxyType({}),
    **settings: Any,
) -> Iterator[Running]:
    """shape: fields of the model's HF config. settings: of the engines."""
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(f"{directory}/model", max_position_embeddings=1024, **shape)
        adapters = {
            f"a{n}": make_adapter(Path(directory, f"a{n}"), model, seed=n) for n in range(ADAPTERS)
        }
        settings |= {"served_model_name": "model", "device": "cpu", "threads": 1}
        config = FleetConfig(
            EngineConfig(model, **settings),
            replicas=replicas,
            port=0,
            directory=f"{directory}/fleet",
            adapters=adapters,
        )
        running = LocalFleet(config, engine)
        try:
            running.start()
            yield Running(running)
        finally:
            running.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--rounds", type=int, help="of each fault (default: 5 to 20)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="each round as JSON, on standard error")
    arguments = parser.parse_args()
    with fleet() as running:
        say = running.fleet.say
        heads = ("rounds", "requests", "lost", "refused", "cut", "told", "TTFT", "whole", "longest")
        say(f"{'fault':16}{heads[0]:>7}{heads[1]:>10}" + "".join(f"{h:>9}" for h in heads[2:]))
        for name in arguments.only:
            rounds = []
            for _ in range(arguments.rounds or FAULTS[name][2]):
                rounds.append(asyncio.run(run(running, name, arguments.clients)))
                if arguments.json:
                    say(json.dumps({name: dataclasses.asdict(rounds[-1])}), aside=True)
            say(row(name, rounds))


if __name__ == "__main__":
    main()
