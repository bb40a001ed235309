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

from cluster.errors import BadRequest, FleetError

EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
# A whole body may take so long to come; HAProxy waits less for its start.
BODY_S = 60.0
# A client that still sends its body may not read our answer: so much more is read and dropped.
DISCARDED_BODIES_MAX = 4
DEADLINE_HEADER = "x-request-deadline-ms"
MILLISECONDS = r"^[0-9]{1,12}$"
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class BodyTooLarge(FleetError):
    status = 413
    code = "body_too_large"
    type = "invalid_request_error"


class UnsupportedMediaType(FleetError):
    status = 415
    code = "unsupported_media_type"
    type = "invalid_request_error"


class BodyTooSlow(FleetError):
    status = 408
    code = "body_too_slow"
    type = "invalid_request_error"


class NoSuchRoute(FleetError):
    status = 404
    code = "not_found"
    type = "invalid_request_error"


class MethodNotAllowed(FleetError):
    """allow: the methods that the path takes."""

    status = 405
    allow = ""
    code = "method_not_allowed"
    type = "invalid_request_error"


def refused(error: HTTPException, scope: Scope) -> FleetError:
    """What the router says, as ours."""
    method, path = scope["method"], scope["path"]
    if error.headers:
        allow = error.headers["Allow"]
        wrong = MethodNotAllowed(f"{path} takes {allow}, not {method}")
        wrong.allow = allow
        return wrong
    return NoSuchRoute(f"no route {method} {path}")


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def deadline_s(request: Request, now_s: float) -> float | None:
    """The time until which the client waits, by a header that gives milliseconds from now.

    Raises BadRequest.
    """
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    if not re.search(MILLISECONDS, text):
        raise BadRequest(
            f"{DEADLINE_HEADER}: must be a number of milliseconds from now", field=DEADLINE_HEADER
        )
    return now_s + int(text) / 1e3


async def read_body(request: Request, limit: int) -> bytes:
    """Raises BodyTooLarge when all of it is read or it is far over the limit; BodyTooSlow."""
    try:
        async with asyncio.timeout(BODY_S):
            return await _read_body(request, limit)
    except TimeoutError as error:
        raise BodyTooSlow(f"the request body took more than {BODY_S:.0f} s") from error


async def _read_body(request: Request, limit: int) -> bytes:
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
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers["connection"] = "close"
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
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
