"""What a serving process has of the system: a socket to listen on, and the signals that end it."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

from cluster.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--port {port}: cannot listen on {host}: {reason}") from error


class _Signalled(BaseException):
    """SIGINT or SIGTERM, raised in the main thread wherever it is."""


@contextlib.contextmanager
def until_signalled() -> Iterator[threading.Event]:
    """The block is left quietly when the process is asked to end; being asked twice is once."""
    asked = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise _Signalled

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        yield threading.Event()
    except BaseException as error:
        # Ray's own handler, in place while it starts, exits by SIGTERM's number; and what is
        # raised within its extension module comes out as something else.
        by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM
        if not (asked or by_ray):
            raise
