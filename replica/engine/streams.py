"""Requests that wait for an engine's tokens, each on its own event loop."""

import asyncio
import contextlib
from dataclasses import dataclass

from cluster.errors import FleetError
from replica.scheduling.request import Delta, NewRequest


@dataclass(slots=True)
class Stream:
    """submitted: an engine has the request."""

    request: NewRequest
    loop: asyncio.AbstractEventLoop
    deltas: "asyncio.Queue[Delta]"
    since_s: float
    submitted: bool = False


def fail(streams: dict[str, Stream], error: FleetError) -> None:
    for request_id, stream in streams.items():
        deliver(stream.loop, [(stream, Delta(request_id, error=error))])


def deliver(loop: asyncio.AbstractEventLoop, deltas: list[tuple[Stream, Delta]]) -> None:
    def put() -> None:
        for stream, delta in deltas:
            stream.deltas.put_nowait(delta)

    with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits there
        loop.call_soon_threadsafe(put)
