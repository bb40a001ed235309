"""What a serving process has of the system: a socket to listen on, and the signals that end it."""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cluster.errors import ConfigError

EXIT_ENDED = 1
# One Ctrl-C may arrive twice, from the terminal and from a parent that passes it on.
AGAIN_S = 0.5


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL or (error.errno or 0) < 0:  # as getaddrinfo has them
            raise ConfigError(f"--host {host}: no address of this machine") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--port {port}: cannot listen on {host}: {reason}") from error


class _Signalled(BaseException):
    """SIGINT or SIGTERM, raised in the main thread wherever it is."""


@contextlib.contextmanager
def until_signalled(end_now: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """The block is left quietly when the process is asked to end. Asked again while the block
    cleans up, the process calls `end_now` and exits at once.
    """
    asked_s: float | None = None
    ended = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if asked_s is None:
            asked_s = time.monotonic()
            ended.set()  # what is raised in a finalizer is ignored
            raise _Signalled
        if time.monotonic() > asked_s + AGAIN_S:
            end_now()
            os._exit(EXIT_ENDED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        yield ended
    except BaseException as error:
        # Ray's own handler, in place while it starts, exits by SIGTERM's number; and what is
        # raised within its extension module comes out as something else.
        by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM
        if asked_s is None and not by_ray:
            raise


@contextlib.contextmanager
def ending_at_once(end: Callable[[], None]) -> Iterator[None]:
    """Asked to end within the block, the process calls `end` on a thread and exits, even while its
    main thread waits in code that hears no signal, or that has set a handler of its own.
    """
    wakeup, woken = os.pipe()
    os.set_blocking(woken, False)
    before = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(wakeup, 1)[0]:
            if number in (signal.SIGINT, signal.SIGTERM):
                end()
                os._exit(EXIT_ENDED)

    thread = threading.Thread(target=listen, name="ending", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(woken, b"\0")
        thread.join()
        os.close(wakeup)
        os.close(woken)
