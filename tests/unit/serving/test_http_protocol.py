"""Clients that httptools alone would answer wrongly, or wait for without end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest

from replica.serving import http_protocol
from replica.serving.single_process import Listening
from tests.raw_http import exchange
from tests.serving import BASE, app_with
from tests.stub_engine import StubEngine
from tests.until import until


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
async def port(engine: StubEngine) -> AsyncIterator[int]:
    server = Listening(await app_with(engine), engine, drain_s=0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


def post(version: str, *headers: str, stream: bool = False) -> bytes:
    body = json.dumps({"model": BASE, "prompt": [5], "max_tokens": 3, "stream": stream}).encode()
    lines = [f"POST /v1/completions HTTP/{version}", "Host: localhost", *headers]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    return head.encode() + body


async def test_an_offer_of_another_protocol_is_passed_over(port: int) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    answer = await exchange(port, post("1.1", *offer))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 3


async def test_http_1_0_is_streamed_to_without_chunks(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post("1.0", stream=True))
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert content.startswith(b"data: {") and content.endswith(b"data: [DONE]\n\n")


async def test_a_connection_is_kept_for_further_requests(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(60):
        for offer in (("Connection: Upgrade", "Upgrade: h2c"), ()):
            writer.write(post("1.1", *offer))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            assert json.loads(await reader.readexactly(length))["usage"]
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: loc"], ids=len)
@pytest.mark.parametrize("first", [False, True])
async def test_a_connection_without_headers_is_closed(
    port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes, first: bool
) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_S", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(60):
        if not first:
            writer.write(post("1.1"))
            assert b" 200 " in await reader.readline()
        writer.write(sent)
        await reader.read()
    writer.close()


async def test_an_answer_may_take_longer_than_headers_may(
    engine: StubEngine, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_S", 0.1)
    engine.first_token_s = 0.4
    assert (await exchange(port, post("1.1"))).startswith(b"HTTP/1.1 200 ")
