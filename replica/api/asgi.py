"""Beside Starlette: bounded bodies, errors in OpenAI's shape, work ended by a disconnect."""

import asyncio
import math
import re
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from cluster.errors import FleetError

EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
# A client that still sends its body may not read our answer: so much more is read and dropped.
DISCARDED_BODIES_MAX = 4
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


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


def refused(error: HTTPException, scope: Scope) -> FleetError:
    """What the router says, as ours."""
    method, path = scope["method"], scope["path"]
    if error.headers:
        return MethodNotAllowed(f"{path} takes {error.headers['Allow']}, not {method}")
    return NoSuchRoute(f"no route {method} {path}")


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


async def read_body(request: Request, limit: int) -> bytes:
    """Raises BodyTooLarge when all of it is read or it is far over the limit."""
    parts: list[bytes] = []
    size = 0
    async with aclosing(request.stream()) as stream:
        async for part in stream:
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size <= DISCARDED_BODIES_MAX * limit:
                parts.clear()
            else:
                break
    if size > limit:
        raise BodyTooLarge(f"the request body is larger than {limit} bytes")
    return b"".join(parts)


def error_response(error: FleetError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, BodyTooLarge):
        headers["connection"] = "close"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error), error.status, headers, JsonResponse.media_type)


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
