"""Ports of a local fleet: its own among the fleets of this machine, and where clients connect."""

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

from cluster.errors import ConfigError, StartupError
from cluster.private import make_private

# Above Ray's worker ports, below Serve's replica ports and the kernel's ephemeral range.
_PORTS = range(20_000, 30_000)
# The first port of each fleet's block of replica ports. One machine runs at most this many fleets.
# Serve keeps the port of a replica that has gone unused for `drain_s` and more.
_REPLICA_PORTS = range(30_000, 32_700, 100)
LOOPBACK = "127.0.0.1"


class ReplicaPorts:
    """A block of replica ports, reserved for this fleet among the fleets of this machine.

    HAProxy connects to a dead replica's port for a moment longer. If another fleet's replica
    listened there by then, it would get this fleet's requests.
    """

    def __init__(self) -> None:
        directory = Path(tempfile.gettempdir()) / f"lorafleet-ports-{os.getuid()}"
        make_private(directory)
        for first in _REPLICA_PORTS:
            # The kernel releases the lock when the process ends, even if it is killed.
            self._lock = (directory / str(first)).open("w")
            self.ports = range(first, first + _REPLICA_PORTS.step)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if all(map(_free, self.ports)):  # else replicas of a killed fleet live on
                    return
            self._lock.close()
        raise StartupError("too many fleets run on this machine: no ports are left for replicas")

    def release(self) -> None:
        self._lock.close()


def _free(port: int) -> bool:
    try:
        with socket.create_server((LOOPBACK, port)):
            return True
    except OSError:
        return False


def numeric(host: str) -> str:
    """The address of a host's name. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host: {host!r}: {error.strerror}", field="host") from error
    return str(found[0][4][0])


def bracketed(host: str) -> str:
    """The address as URLs have it."""
    return f"[{host}]" if ":" in host else host


def bind(host: str, port: int) -> str:
    """Where HAProxy listens, in its words. host: an address.

    One socket: HAProxy 2.8 hands either IPv4 or IPv6 ones on to its successor. Without the last
    word the successor takes an IPv6 one for another: a moment without a listener refuses clients.
    """
    taken = "" if ":" not in host else " v4v6" if host == "::" else " v6only"
    return f"{bracketed(host)}:{port}{taken}"


def free_port(host: str = LOOPBACK) -> int:
    """A free port outside the ephemeral range.

    Until HAProxy binds it, the kernel could assign an ephemeral port to any connection.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server((host, port), family=family):
            return port
    raise StartupError(f"no port is free on {host}")
