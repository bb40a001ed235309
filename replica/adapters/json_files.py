"""Reads JSON files that come with an adapter: bounded, and odd ones as if they were not there."""

import json
import re
from typing import Any

from cluster.file_copies import open_regular

BYTES_MAX = 4 * 2**20
_BLANKS = re.compile(r"[ \t\n\r]*")


def read_start(directory: str, name: str, count: int = BYTES_MAX + 1) -> bytes | None:
    """The first `count` bytes. None if there is no such file, or none that can be read."""
    try:
        with open_regular(f"{directory}/{name}") as file:
            return file.read(count)
    except (OSError, ValueError):
        return None


def read_object(directory: str, name: str) -> dict[str, Any]:
    raw = read_start(directory, name) or b"{}"
    try:
        value = json.loads(raw) if len(raw) <= BYTES_MAX else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def member_at_start(text: str, name: str) -> Any:
    """A member of the JSON object that `text` begins with, which may be cut off after it. None if
    it is not there.
    """
    decoder = json.JSONDecoder()
    at, separator = 0, "{"
    try:
        while True:
            at = _after(text, at, separator)
            key, at = decoder.raw_decode(text, at)
            value, at = decoder.raw_decode(text, _after(text, at, ":"))
            if key == name:
                return value
            separator = ","
    except (ValueError, RecursionError):
        return None


def _after(text: str, at: int, separator: str) -> int:
    """Where the value after this separator begins. Raises ValueError."""
    at = _blanks(text, at)
    if text[at : at + 1] != separator:
        raise ValueError(f"no {separator}")
    return _blanks(text, at + 1)


def _blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()
