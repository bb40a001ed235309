"""Plain ASGI: bodies read to a bound, JSON and event streams sent, work ended by a disconnect."""

import asyncio
import math
import re
from collections.abc import Coroutine, Iterable
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import FleetError

JSON = (b"content-type", b"application/json")
TEXT = (b"content-type", b"text/plain; charset=utf-8")
EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
# A client that still sends its body may not read our answer: so much more is read and dropped.
DISCARDED_BODIES_MAX = 4
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

Header = tuple[bytes, bytes]


class BodyTooLarge(FleetError):
    status = 413
    code = "body_too_large"
    type = "invalid_request_error"


class NoSuchRoute(FleetError):
    status = 404
    code = "not_found"
    type = "invalid_request_error"


class MethodNotAllowed(FleetError):
    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"


class ClientGone(Exception):
    """The client left before its request was read: there is nobody to answer."""


def header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def read_body(receive: Receive, limit: int) -> bytes:
    """Raises BodyTooLarge when all of it is read or it is far over the limit, ClientGone."""
    parts: list[bytes] = []
    size = 0
    more = True
    while more and size <= DISCARDED_BODIES_MAX * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        if size > limit:
            parts.clear()
        else:
            parts.append(part)
    if size > limit:
        raise BodyTooLarge(f"the request body is larger than {limit} bytes")
    return b"".join(parts)


async def send_body(
    send: Send, status: int, body: bytes, headers: Iterable[Header] = (JSON,)
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, body: Any, status: int = 200) -> None:
    await send_body(send, status, orjson.dumps(body))


async def send_error(send: Send, error: FleetError) -> None:
    headers = [JSON]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if isinstance(error, BodyTooLarge):
        headers.append((b"connection", b"close"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send_body(send, error.status, error_body(error), headers)


def error_body(error: FleetError) -> bytes:
    """In OpenAI's shape."""
    return orjson.dumps(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.field,
                "code": error.code,
            }
        }
    )


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does `work` and cancels it as soon as the client is gone. The body has been read."""
    task = asyncio.current_task()
    assert task is not None
    gone = False
    cancelled_before = task.cancelling()

    async def watch() -> None:
        nonlocal gone
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await work
    except asyncio.CancelledError:
        # What is raised on is somebody else's: the server's shutdown, or Serve's own watch.
        if not gone or task.uncancel() > cancelled_before:
            raise
    finally:
        watcher.cancel()
