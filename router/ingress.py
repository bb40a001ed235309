"""POST /internal/route: tells HAProxy which replica gets a request, given the request's body."""

import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# A complete string, a bracket, or the opening quote of a string that the prefix cuts off.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]|"', re.DOTALL)
_STRING_VALUE = re.compile(rb'\s*:\s*("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_COLON = re.compile(rb"\s*:")

# English text has about four bytes a token. Routing needs only the order of magnitude.
_BYTES_PER_TOKEN = 4


class Ingress:
    """The router deployment. handle: the replica deployment's DeploymentHandle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def __serve_build_asgi_app__(self) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._answer(scope, receive, send)

        return app  # a plain function, since uvicorn treats a bound method as an ASGI 2 app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        body = await _read(receive)
        endpoint = await self._pick(find_model(body), prompt_tokens(scope, body))
        status, answer = (200, endpoint) if endpoint else (503, {"error": "no replica"})
        content = json.dumps(answer).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _pick(self, model: str | None, tokens: int) -> dict[str, Any] | None:
        async with self._handle.choose_replica(model, tokens, _reserve=False) as selection:
            replica = selection._replica
            endpoint = replica.backend_http_endpoint
            if endpoint is None:
                return None
            host, port = endpoint
            replica_id = replica.replica_id.to_full_id_str()
            return {"host": host, "port": port, "replica_id": replica_id}


def find_model(body: bytes) -> str | None:
    """The value of the top-level key `model` in a JSON object that may be truncated anywhere.

    Of repeated keys, the last one counts, as in JSON parsers. None if this prefix has no such key,
    or its value is not a string: the request is then routed by load, and the replica, which
    parses the whole body, answers.
    """
    depth, model = 0, None
    for token in _TOKEN.finditer(body):
        text = token.group()
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        elif text == b'"':
            break
        elif depth == 1 and _COLON.match(body, token.end()) and _decode(text) == "model":
            value = _STRING_VALUE.match(body, token.end())
            model = _decode(value[1]) if value else None
    return model


def prompt_tokens(scope: Scope, body: bytes) -> int:
    """Estimates the request's tokens. For a truncated body, HAProxy sends its whole size in
    `X-Body-Truncated: FORWARDED/TOTAL`.
    """
    length = len(body)
    for name, value in scope.get("headers", ()):
        total = value.rpartition(b"/")[2]
        if name == b"x-body-truncated" and total.isdigit():
            length = max(length, int(total))
    return length // _BYTES_PER_TOKEN


def _decode(literal: bytes) -> str | None:
    try:
        text = json.loads(literal)
        text.encode()  # JSON allows a lone surrogate, but no model's name has one
    except ValueError:
        return None
    assert isinstance(text, str)
    return text


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return b"".join(chunks)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
