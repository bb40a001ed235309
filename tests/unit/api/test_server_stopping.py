"""A stopping server sends an error to the requests that outlast the drain time."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from replica.api.server import Server
from replica.serving.single_process import Listening
from tests.serving import BASE, CONFIG, app_with
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, until

PLAIN = {"model": BASE, "prompt": "hi", "max_tokens": 120}
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def listening(
    app: Server, engine: StubEngine, drain_s: float
) -> AsyncIterator[tuple[Listening, int, threading.Thread]]:
    """The server, its port and its thread. The test stops the server."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Listening(app, engine, drain_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    await until(lambda: server.started)
    try:
        yield server, port, thread
    finally:
        server.should_exit = True
        await until(lambda: not thread.is_alive())


async def ask(port: int, body: dict[str, Any], *, sent: float = 1.0) -> Connection:
    """Sends a request. sent: the fraction of the body that is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: replica\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data[: int(sent * len(data))])
    await writer.drain()
    return reader, writer


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, read up to the end of the connection."""
    data = await asyncio.wait_for(reader.read(), TIMEOUT_S)
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize("n", [1, 3])
async def test_requests_that_outlast_the_drain_time_get_an_error(
    n: int, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = StubEngine(step_s=0.01)
    app = await app_with(engine)
    async with listening(app, engine, 0.3) as (server, port, thread):
        begun, begun_writer = await ask(port, {**PLAIN, "n": n, "stream": True})
        await begun.readuntil(b"data: ")
        engine.hold = True  # No answer can finish before the server stops.
        waiting = [
            await ask(port, {**PLAIN, "n": n}),
            await ask(port, {**PLAIN, "n": n, "stream": True}),
        ]
        await until(lambda: len(engine.running) == 3 * n)
        waiting.append(await ask(port, PLAIN, sent=0.5))
        await until(lambda: len(server.server_state.tasks) == 4)
        server.should_exit = True
        for reader, writer in waiting:
            status, headers, body = await answer(reader)
            assert (status, headers["content-type"]) == (503, "application/json")
            assert headers["retry-after"] == "1"
            assert json.loads(body)["error"]["code"] == "shutting_down"
            writer.close()
        end = (await asyncio.wait_for(begun.read(), TIMEOUT_S)).decode()
        begun_writer.close()
        assert "[DONE]" not in end
        last = end.rpartition("data: ")[2]
        error, _, rest = last.partition("\n\n")
        assert json.loads(error)["error"]["code"] == "shutting_down"
        assert rest == "\r\n0\r\n\r\n"
        await until(lambda: not thread.is_alive())
    assert (engine.running, app.active) == ({}, 0)
    assert capfd.readouterr().err == ""


async def test_requests_that_end_within_the_drain_time_are_answered(
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine = StubEngine()
    engine.hold = True
    app = await app_with(engine)
    async with listening(app, engine, 60) as (server, port, thread):
        reader, writer = await ask(port, PLAIN)
        await until(lambda: len(engine.running) == 1)
        server.should_exit = True
        await until(lambda: not server.servers[0].is_serving())
        engine.hold = False
        assert (await answer(reader))[0] == 200
        writer.close()
        await until(lambda: not thread.is_alive())
    assert capfd.readouterr().err == ""


async def test_a_client_that_does_not_read_is_disconnected(
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine = StubEngine(tokens_per_step=100)
    app = await app_with(engine, config=replace(CONFIG, context=10**9))
    async with listening(app, engine, 0.1) as (server, port, thread):
        body = {**PLAIN, "max_tokens": 10**8, "stream": True, "return_token_ids": True}
        _, writer = await ask(port, body)
        await until(lambda: any(c.flow.write_paused for c in server.server_state.connections))
        engine.hold = True
        server.should_exit = True
        await until(lambda: not thread.is_alive())
        writer.close()
    assert (engine.running, app.active) == ({}, 0)
    assert capfd.readouterr().err == ""
