"""When the engine must have moved again, in memory that it shares with its server's process.

The engine's own thread writes it, before each step and each wait, so it proves that the loop moves.
A message would wait in the pipe behind others, and a heartbeat of another thread proves nothing.
"""

import math
import mmap
import os

# Where a step may take this long without a fault: the first ones, a kernel that is compiled, a load
# that the batch waits for.
SLOW_S = 60.0
# A step counts as hung once it takes this many times its prediction, which ignores the context's
# length and other processes of the machine.
_PREDICTED_TIMES = 10.0


def longest_s(predicted_s: float | None, hang_s: float) -> float:
    """Longest time that a step may take. predicted_s: None if nothing like it was measured yet."""
    if predicted_s is None:
        return max(SLOW_S, hang_s)
    return max(_PREDICTED_TIMES * predicted_s, hang_s)


class Pulse:
    """Seconds of the monotonic clock, which all processes of a machine share.

    The value is one aligned double, so a reader sees either the old or the new one.

    fd: of the memory that another process has made; None makes it.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("pulse") if fd is None else fd
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        self._due_s = memoryview(self._memory).cast("d")
        if fd is None:
            self._due_s[0] = math.inf  # the engine has not started

    def expect(self, due_s: float) -> None:
        """The engine's thread will call this again before `due_s`."""
        self._due_s[0] = due_s

    def late(self, now_s: float) -> bool:
        return now_s > self._due_s[0]
