"""Waits for conditions, instead of sleeping for a guessed time.

The timeouts only end a hang. They do not measure speed: each is many times what a busy machine
takes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

TIMEOUT_S = 60.0
WORK_S = 1200.0  # for tests with long computations
POLL_S = 0.005


async def until(
    condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = TIMEOUT_S
) -> float:
    """Waits until `condition` returns True, and returns the seconds it took.

    condition: a function or a coroutine function.
    """
    started_s = time.monotonic()
    while True:
        outcome = condition()
        if outcome if isinstance(outcome, bool) else await outcome:
            return time.monotonic() - started_s
        took_s = time.monotonic() - started_s
        assert took_s < timeout_s, f"not within {timeout_s} s"
        await asyncio.sleep(POLL_S)


def until_now(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> float:
    """Like `until`, without an event loop."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(POLL_S)
    return time.monotonic() - started_s
