"""Keys: those of clients, which come by environment, and the operator's, which a process makes.

The operator's key lets commands of the user that a fleet or replica belongs to change it without a
configured key or adapter root. It lies in a file that only this user can read, while the process
lives.
"""

import contextlib
import json
import os
import secrets
import tempfile
from pathlib import Path

from cluster.errors import ConfigError
from cluster.private import make_private

API_KEYS = "LORAFLEET_API_KEYS"
ADMIN_KEYS = "LORAFLEET_ADMIN_KEYS"
OPERATOR_KEY = "LORAFLEET_OPERATOR_KEY"


def read_keys(variable: str) -> tuple[str, ...]:
    """The keys of a variable that has a JSON list of them; none if it is not set.

    Raises ConfigError, which names no key.
    """
    text = os.environ.get(variable) or "[]"
    try:
        keys = json.loads(text)
    except ValueError:
        keys = None
    if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
        raise ConfigError(f'{variable}: must be a JSON list of keys, such as ["key"]')
    return tuple(keys)


class OperatorKey:
    """Made for the server on a port of this machine. `remove` takes its file away."""

    def __init__(self, port: int) -> None:
        self.text = secrets.token_urlsafe(32)
        self._file = _file(port)
        make_private(self._file.parent)
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()
        with open(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.text)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            if self._file.read_text() == self.text:
                self._file.unlink()


def operator_key(port: int) -> str | None:
    """This user's, for what listens on that port of this machine; None if there is none."""
    with contextlib.suppress(OSError):
        return _file(port).read_text()
    return None


def _file(port: int) -> Path:
    return Path(tempfile.gettempdir()) / f"lorafleet-{os.getuid()}" / f"{port}.key"
