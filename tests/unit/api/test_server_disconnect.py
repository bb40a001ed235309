"""A client that disconnects cancels its requests in the engine, over real connections."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from replica.api.asgi import until_disconnect
from tests.serving import BASE, CONFIG, app_with, live
from tests.stub_engine import StubEngine
from tests.until import until

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": BASE, "prompt": "hi", "max_tokens": 120}


@asynccontextmanager
async def connected(
    url: str, body: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which the request has been sent. Closes it at the end."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = json.dumps(body).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: replica\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    )
    writer.write(data)
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("body", [CHAT, PLAIN], ids=["chat", "completion"])
async def test_leaving_in_mid_stream(body: dict[str, Any], n: int) -> None:
    engine = StubEngine(step_s=0.02)
    app = await app_with(engine)
    async with live(app) as url:
        async with connected(url, {**body, "stream": True, "n": n}) as (reader, _):
            await reader.readuntil(b"data: ")
            assert len(engine.running) == n
            engine.hold = True  # The answer cannot finish before the client leaves.
        await until(lambda: not engine.running)
        await until(lambda: app.active == 0)
    assert list(engine.ended.values()) == ["cancelled"] * n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [CHAT, PLAIN], ids=["chat", "completion"])
async def test_leaving_before_the_first_token(body: dict[str, Any], stream: bool, n: int) -> None:
    engine = StubEngine()
    engine.hold = True
    app = await app_with(engine)
    async with live(app) as url:
        async with connected(url, {**body, "stream": stream, "n": n}):
            await until(lambda: len(engine.running) == n)
        await until(lambda: not engine.running)
        await until(lambda: app.active == 0)
    assert list(engine.ended.values()) == ["cancelled"] * n


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_in_mid_answer_without_a_stream(n: int) -> None:
    engine = StubEngine(step_s=0.02)
    async with live(await app_with(engine)) as url:
        async with connected(url, {**PLAIN, "n": n}):
            await until(lambda: engine.steps > 3)
            assert len(engine.running) == n
            engine.hold = True
        await until(lambda: not engine.running)
    assert list(engine.ended.values()) == ["cancelled"] * n


async def test_leaving_with_several_prompts() -> None:
    engine = StubEngine(step_s=0.02)
    async with live(await app_with(engine)) as url:
        async with connected(url, {**PLAIN, "prompt": ["a", "b"], "n": 2, "stream": True}) as (
            reader,
            _,
        ):
            await reader.readuntil(b"data: ")
        await until(lambda: not engine.running)
    assert list(engine.ended.values()) == ["cancelled"] * 4


async def test_leaving_while_the_request_is_still_being_sent() -> None:
    engine = StubEngine()
    app = await app_with(engine)
    async with live(app) as url:
        parts = urlsplit(url)
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: replica\r\nContent-Length: 99\r\n\r\n{"
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with connected(url, {**PLAIN, "max_tokens": 1}) as (reader, _):  # Another client.
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert app.active == 0
    assert len(engine.seen) == 1


async def test_a_client_that_leaves_does_not_end_anothers_stream() -> None:
    engine = StubEngine(step_s=0.02)
    body = {**PLAIN, "stream": True}
    async with live(await app_with(engine)) as url, connected(url, body) as (staying, _):
        async with connected(url, body) as (leaving, _):
            await leaving.readuntil(b"data: ")
        await until(lambda: "cancelled" in engine.ended.values())
        engine.step_s = 0.0
        await staying.readuntil(b"data: [DONE]")
    assert sorted(engine.ended.values()) == ["cancelled", "finished"]


async def test_a_second_request_on_the_same_connection_after_a_stream() -> None:
    """The watcher for a disconnect must not consume the next request's message."""
    engine = StubEngine()
    body = {**PLAIN, "max_tokens": 2, "stream": True}
    async with live(await app_with(engine)) as url, connected(url, body) as (reader, writer):
        await reader.readuntil(b"[DONE]\n\n")
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"GET /health HTTP/1.1\r\nHost: replica\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_cancellation_from_outside_is_not_lost_in_a_disconnect() -> None:
    """Ray Serve watches the connection too, and cancels the task at the same moment."""
    ended = []

    async def receive() -> dict[str, Any]:
        task.cancel()  # As Serve does.
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    task = asyncio.create_task(until_disconnect(receive, work()))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_the_server_stopping_in_mid_stream_cancels_what_runs() -> None:
    engine = StubEngine(step_s=0.02)
    app = await app_with(engine, config=CONFIG)
    task: asyncio.Task[None] | None = None
    sent: list[dict[str, Any]] = []
    body = json.dumps({**PLAIN, "stream": True}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    task = asyncio.create_task(app(scope, receive, send))
    await until(lambda: len(sent) > 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(engine.ended.values()) == ["cancelled"]
    assert app.active == 0
