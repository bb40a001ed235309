"""How fast this machine runs Python: figures of different machines differ by it."""

import statistics
import time

_TURNS = 1_000_000


def python_ms() -> float:
    """Milliseconds of this thread's CPU time for a fixed loop; the median of 5."""
    return statistics.median(_loop_s() for _ in range(5)) * 1e3


def _loop_s() -> float:
    start_s, total = time.thread_time(), 0
    for turn in range(_TURNS):
        total += turn * turn
    return time.thread_time() - start_s


def shown() -> str:
    return f"this processor: {python_ms():.0f} ms for {_TURNS:,} turns of a loop in Python"
