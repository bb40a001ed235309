"""POST /internal/route: tells HAProxy which replica gets a request, given the request's body."""

import asyncio
import contextlib
import json
import logging
import re
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from router.environment import MODEL_HEADER

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# A complete string, a bracket, or the opening quote of a string that the prefix cuts off.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]|"', re.DOTALL)
_STRING_VALUE = re.compile(rb'\s*:\s*("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_COLON = re.compile(rb"\s*:")

_GZIP_MAGIC = b"\x1f\x8b"
# As much as HAProxy forwards of a body that is not compressed.
_INFLATED_MAX = 2**18

# English text has about four bytes a token. Routing needs only the order of magnitude.
_BYTES_PER_TOKEN = 4

# A router that finds no replica within this time serves all the same: the replicas may still start.
_REPLICAS_S = 5.0
_POLL_S = 0.05


class Ingress:
    """The router deployment. handle: the replica deployment's DeploymentHandle."""

    def __init__(self, handle: Any) -> None:
        from replica.serving.node_port import bind_to_node

        bind_to_node()
        # Connects the handle to Serve's controller, with the help of Ray's control store. Otherwise
        # the first request would wait for that, in vain if the store has ended meanwhile.
        self._handle = handle.options()

    async def __serve_build_asgi_app__(self) -> App:
        deadline_s = time.monotonic() + _REPLICAS_S
        while not self._handle.running_replicas_populated():
            if time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(_POLL_S)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._answer(scope, receive, send)

        return app  # a plain function, since uvicorn treats a bound method as an ASGI 2 app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        body = inflated(await _read(receive))
        model = find_model(body) or named_model(scope)
        endpoint = await self._pick(model, prompt_tokens(scope, body))
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


def inflated(body: bytes) -> bytes:
    """The start of a gzip body, which no JSON begins like; any other body as it is."""
    if not body.startswith(_GZIP_MAGIC):
        return body
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(body, _INFLATED_MAX)
    return body


def find_model(body: bytes) -> str | None:
    """The value of the top-level key `model` in a JSON object that may be truncated anywhere, or of
    `lora_path`, which names an adapter beside the base model.

    Of repeated keys, the last one counts, as in JSON parsers. None if this prefix has no such key,
    or its value is not a string: the request is then routed by load, and the replica, which
    parses the whole body, answers.
    """
    depth = 0
    found: dict[str | None, str | None] = {}
    for token in _TOKEN.finditer(body):
        text = token.group()
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        elif text == b'"':
            break
        elif depth == 1 and _COLON.match(body, token.end()):
            key = _decode(text)
            if key in ("model", "lora_path"):
                value = _STRING_VALUE.match(body, token.end())
                found[key] = _decode(value[1]) if value else None
    return found.get("lora_path") or found.get("model")


def named_model(scope: Scope) -> str | None:
    """The model that a header names."""
    for name, value in scope.get("headers", ()):
        if name == MODEL_HEADER.encode():
            return str(value.decode("utf-8", "replace")) or None
    return None


def prompt_tokens(scope: Scope, body: bytes) -> int:
    """Estimates the request's tokens: 0 for a form, which has an adapter's files. For a truncated
    body, HAProxy sends its whole size in `X-Body-Truncated: FORWARDED/TOTAL`.
    """
    if body.startswith(b"--"):
        return 0
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
