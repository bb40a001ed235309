"""Standard output and error of a fleet's process: Ray and Serve write on both, users read both."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

_REPEAT_S = 15.0


class OutputRedirect:
    """Redirects standard output and error to a file until `end`: Ray and Serve write on both."""

    def __init__(self, log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        with log.open("wb") as file:
            log.chmod(0o600)
            for fd, _ in self._saved:
                os.dup2(file.fileno(), fd)

    def say(self, line: str, aside: bool) -> None:
        """Writes a line to the original standard output, or with `aside` to standard error."""
        os.write(self._saved[aside][1], f"{line}\n".encode())

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Says on standard error what is done in the block: live on a terminal, else in a line, and
        again while it takes long.
        """
        with open(os.dup(self._saved[1][1]), "w") as error:
            console = Console(file=error)
            if console.is_terminal:
                with console.status(f"{what} …"):
                    yield
                return
        self.say(f"lorafleet: {what}", aside=True)
        done = threading.Event()
        began_s = time.monotonic()

        def repeat() -> None:
            while not done.wait(_REPEAT_S):
                self.say(f"lorafleet: {what}: {time.monotonic() - began_s:.0f} s", aside=True)

        thread = threading.Thread(target=repeat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in self._saved:
            os.dup2(copy, fd)
            os.close(copy)
