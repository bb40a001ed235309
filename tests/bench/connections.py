"""HAProxy's memory with thousands of open streams, and after its targets have changed.

    python -m tests.bench.connections [--streams N] [--body-bytes N]

A stub engine gives each stream a token every 5 s. Each change of the number of replicas makes Serve
start HAProxy anew, and the old process goes on with its streams. All of them must still run at the
end.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import psutil

from cluster.config import EngineConfig, FleetConfig
from router.local import APPLICATION, LocalFleet
from tests.models import make_model
from tests.stub_engine import StubEngine

AT_ONCE = 500
CHANGES = (2, 1, 2)
SETTLED_S = 5.0
MIB = 2**20


def slow(config: EngineConfig) -> StubEngine:
    """The engine of the benchmark's replicas."""
    return StubEngine(step_s=5.0, queue_max=10**6, config=config)


class Stream(asyncio.Protocol):
    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False

    def data_received(self, data: bytes) -> None:
        if not self.begun.done() and b"data: " in data:
            assert b" 200 " in data[:20] or b"data: {" in data, data[:200]
            self.begun.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        if not self.begun.done():
            self.begun.set_exception(error or ConnectionError("closed without an answer"))


async def open_streams(port: int, count: int, body_bytes: int) -> list[Stream]:
    body = {"model": "model", "prompt": "x", "user": "u" * body_bytes, "max_tokens": 10**6}
    data = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: fleet\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    places = asyncio.Semaphore(AT_ONCE)

    async def one() -> Stream:
        async with places:
            transport, stream = await asyncio.get_running_loop().create_connection(
                Stream, "127.0.0.1", port
            )
            transport.write(request)
            await stream.begun
            return stream

    return await asyncio.gather(*(one() for _ in range(count)))


def haproxy() -> str:
    """The number of HAProxy's processes, and the memory that they have of their own."""
    found = [p for p in psutil.Process().children(recursive=True) if p.name() == "haproxy"]
    return f"{len(found)} processes, {sum(p.memory_full_info().uss for p in found) / MIB:.0f} MiB"


async def measure(running: LocalFleet, streams: int, body_bytes: int) -> None:
    from ray import serve

    from router.app import compose

    running.say(f"no streams: {haproxy()}")
    opened = await open_streams(running.config.port, streams, body_bytes)
    running.say(f"{len(opened)} streams: {haproxy()}")
    bare = dataclasses.replace(running.config, engine=running._engine_config())
    for replicas in CHANGES:
        config = dataclasses.replace(bare, replicas=replicas)
        application = compose(config, "tests.bench.connections:slow")
        await asyncio.to_thread(serve.run, application, name=APPLICATION)
        await asyncio.sleep(SETTLED_S)
        alive = sum(not stream.ended for stream in opened)
        running.say(f"{replicas} replicas, {alive} streams: {haproxy()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=4000)
    parser.add_argument("--body-bytes", type=int, default=1000)
    arguments = parser.parse_args()
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(f"{directory}/model", max_position_embeddings=2**21)
        engine = EngineConfig(model, served_model_name="model", device="cpu", threads=1)
        config = FleetConfig(
            engine,
            port=0,
            directory=f"{directory}/fleet",
            drain_s=600.0,
            # All of them come from one address.
            source_connections_max=2 * arguments.streams,
        )
        running = LocalFleet(config, engine="tests.bench.connections:slow")
        try:
            running.start()
            asyncio.run(measure(running, arguments.streams, arguments.body_bytes))
        except Exception as error:  # what Python says of it goes to the fleet's own log
            running.say(f"failed: {error!r}")
            raise
        finally:
            running.kill()


if __name__ == "__main__":
    main()
