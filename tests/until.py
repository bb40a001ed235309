"""Waiting for what must come true: no test sleeps and hopes.

The deadline is there to end a hang. It says nothing about how fast anything is, so it is many times
what a busy machine takes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

TIMEOUT_S = 60.0
WORK_S = 1200.0  # where the test itself has much to compute
POLL_S = 0.005


async def until(
    condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = TIMEOUT_S
) -> float:
    """Seconds it took. The condition may be a coroutine function."""
    started_s = time.monotonic()
    while True:
        outcome = condition()
        if outcome if isinstance(outcome, bool) else await outcome:
            return time.monotonic() - started_s
        took_s = time.monotonic() - started_s
        assert took_s < timeout_s, f"not within {timeout_s} s"
        await asyncio.sleep(POLL_S)


def until_now(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> float:
    """The same without an event loop."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(POLL_S)
    return time.monotonic() - started_s
