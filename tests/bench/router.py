"""The cost of HAProxy and the router, against the replica's own port.

    python -m tests.bench.router [--rounds N] [--model DIR]

A stub engine replaces the model, so that only the path counts. Measures TTFT at concurrency 1 and
streamed tokens/s at 64, in turn through the fleet and at the port of its one replica.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.config import EngineConfig, FleetConfig
from router.local import LocalFleet
from tests.fleet import replicas_among
from tests.models import make_model
from tests.stub_engine import StubEngine

TTFT_REQUESTS = 100
STREAMS = 64
STREAM_TOKENS = 200
END = b"0\r\n\r\n"


def stub(config: EngineConfig) -> StubEngine:
    """The engine of the benchmark's replicas: generates tokens as fast as the server takes them."""
    return StubEngine(script=tuple(range(40, 80)), queue_max=config.queue_max, config=config)


class Stream(asyncio.Protocol):
    """One keep-alive connection. Counts events without parsing, so as not to be the bottleneck."""

    def __init__(self) -> None:
        self.events = 0
        self.first_s = 0.0
        self._tail = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.events and b"data: " in data:
            self.first_s = time.perf_counter()
        self.events += data.count(b"data: ")
        self._tail = (self._tail + data)[-len(END) :]
        if self._tail == END and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("closed in mid-stream"))

    async def ask(self, request: bytes) -> tuple[int, float]:
        """Tokens streamed, and seconds to the first."""
        self.events = 0
        self._done = asyncio.get_running_loop().create_future()
        start_s = time.perf_counter()
        assert isinstance(self._transport, asyncio.Transport)
        self._transport.write(request)
        await self._done
        return self.events - 1, self.first_s - start_s  # the last event is [DONE]


def request(model: str, tokens: int) -> bytes:
    body = json.dumps(
        {"model": model, "prompt": "x" * 200, "max_tokens": tokens, "stream": True}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: fleet\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def connect(port: int) -> Stream:
    _, stream = await asyncio.get_running_loop().create_connection(Stream, "127.0.0.1", port)
    return stream


async def ttft_s(port: int) -> list[float]:
    stream = await connect(port)
    return [(await stream.ask(request("model", 2)))[1] for _ in range(TTFT_REQUESTS)]


async def tokens_per_s(port: int) -> float:
    streams = await asyncio.gather(*(connect(port) for _ in range(STREAMS)))
    ask = request("model", STREAM_TOKENS)
    start_s = time.perf_counter()
    answers = await asyncio.gather(*(stream.ask(ask) for stream in streams))
    tokens = sum(count for count, _ in answers)
    assert tokens == STREAMS * STREAM_TOKENS, f"{tokens} tokens arrived"
    return tokens / (time.perf_counter() - start_s)


@contextlib.contextmanager
def fleet(model_dir: str | None) -> Iterator[LocalFleet]:
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        model_dir = model_dir or make_model(f"{directory}/model")
        engine = EngineConfig(model_dir, served_model_name="model", device="cpu")
        config = FleetConfig(engine, port=0, directory=f"{directory}/fleet")
        running = LocalFleet(config, engine="tests.bench.router:stub")
        try:
            running.start()
            yield running
        finally:
            running.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="directory of a model, for its tokenizer (default: tiny)")
    arguments = parser.parse_args()
    with fleet(arguments.model) as running:
        (replica,) = replicas_among(psutil.Process().children(recursive=True))
        ports = {"fleet": running.config.port, "replica": replica.port}
        ttft: dict[str, list[float]] = {way: [] for way in ports}
        rate: dict[str, list[float]] = {way: [] for way in ports}
        for port in ports.values():
            asyncio.run(tokens_per_s(port))
        for _ in range(arguments.rounds):
            for way, port in ports.items():
                ttft[way] += asyncio.run(ttft_s(port))
                rate[way].append(asyncio.run(tokens_per_s(port)))
    print(f"{'':10}{'TTFT p50':>12}{'TTFT p99':>12}{'tokens/s':>12}")
    for way in ports:
        p50, p99 = statistics.median(ttft[way]), statistics.quantiles(ttft[way], n=100)[98]
        print(f"{way:10}{p50 * 1e3:9.1f} ms{p99 * 1e3:9.1f} ms{statistics.median(rate[way]):12.0f}")
    added = statistics.median(ttft["fleet"]) - statistics.median(ttft["replica"])
    share = statistics.median(rate["fleet"]) / statistics.median(rate["replica"])
    print(f"the front adds {added * 1e3:.1f} ms, and carries {share:.2f} of the tokens/s")


if __name__ == "__main__":
    main()
