"""The CPU cost of a streamed token in one replica's HTTP server, with a stub engine.

    python tests/bench/streaming.py

Server and clients run in separate processes. The engine generates one token a step for each
stream, as fast as the server takes them (`--rate 0`) or at a set rate. CPU time is the server's.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def serve(listener: socket.socket, step_s: float, pipe: Connection) -> None:
    import uvicorn

    from replica.api.server import ServerConfig, build_app
    from tests.serving import Book, text
    from tests.stub_engine import StubEngine

    config = ServerConfig(base="tiny", context=100_000, vocab=320)
    app = build_app(StubEngine(step_s=step_s), Book(), text(), config)
    pipe.send("ready")

    def cpu() -> None:
        while True:
            pipe.recv()
            used = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(used.ru_utime + used.ru_stime)

    import threading

    threading.Thread(target=cpu, daemon=True).start()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])


async def stream(port: int, tokens: int) -> tuple[float, int]:
    """Time to the first token, in seconds, and the number of content chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({**BODY, "max_tokens": tokens}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    start = time.perf_counter()
    writer.write(head.encode() + data)
    await reader.readuntil(b'"content":')
    first = time.perf_counter() - start
    chunks, tail = 0, b""
    while b"[DONE]" not in tail:
        part = await reader.read(2**16)
        assert part, "the stream broke off"
        chunks += (tail[-9:] + part).count(b'"content":') - tail[-9:].count(b'"content":')
        tail = tail[-9:] + part
    writer.close()
    return first, chunks


async def measure(port: int, streams: int, tokens: int) -> tuple[list[float], int]:
    done = await asyncio.gather(*(stream(port, tokens) for _ in range(streams)))
    return [first for first, _ in done], sum(chunks for _, chunks in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500, help="per stream")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="tokens/s of all streams; 0: no limit"
    )
    options = parser.parse_args()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    step_s = options.streams / options.rate if options.rate else 0.0
    server = context.Process(target=serve, args=(listener, step_s, theirs), daemon=True)
    server.start()
    theirs.close()  # Without our copy, the pipe closes when the server dies.
    assert pipe.recv() == "ready"
    asyncio.run(measure(port, 2, 10))
    pipe.send("cpu")
    before, start = pipe.recv(), time.perf_counter()
    firsts, chunks = asyncio.run(measure(port, options.streams, options.tokens))
    wall = time.perf_counter() - start
    pipe.send("cpu")
    cpu = pipe.recv() - before
    print(
        f"{options.streams} streams: {chunks / wall:,.0f} tokens/s, "
        f"{cpu / chunks * 1e6:.0f} µs of CPU a token ({chunks / cpu:,.0f} tokens per CPU second), "
        f"TTFT p50 {statistics.median(firsts) * 1e3:.1f} ms"
    )
    server.terminate()


if __name__ == "__main__":
    main()
