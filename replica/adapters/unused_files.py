"""What an adapter's directory has beside the adapter and is not used: a chat template, tokens."""

import json
import os
from pathlib import Path
from typing import Any

from cluster.file_copies import open_regular

_BYTES_MAX = 4 * 2**20
_TEMPLATE, _TOKENIZER, _ADDED = "chat_template.jinja", "tokenizer_config.json", "added_tokens.json"
_NAMES = frozenset((_TEMPLATE, _TOKENIZER, _ADDED))


def unused(path: str, model: str, vocabulary: int) -> list[str]:
    """Sentences for whoever adds the adapter. model: the base model's directory. vocabulary: its
    number of tokens.
    """
    try:
        if _NAMES.isdisjoint(os.listdir(path)):
            return []
    except OSError:  # it has been deleted since it was copied
        return []
    found = []
    template = _template(path)
    if template is not None and template != _template(model):
        found.append("Its chat template is not used: chats have the base model's.")
    added = _json(path, _ADDED)
    beyond = sorted(
        token for token, number in added.items() if type(number) is int and number >= vocabulary
    )
    if beyond:
        found.append(
            f"Its added tokens are not used: {beyond[0]!r} and {len(beyond) - 1} others are beyond "
            f"the base model's {vocabulary}."
        )
    return found


def _template(directory: str) -> str | None:
    text = _read(directory, _TEMPLATE)
    if text is None:
        text = _json(directory, _TOKENIZER).get("chat_template")
    return text.strip() if isinstance(text, str) and text.strip() else None


def _json(directory: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_read(directory, name) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(directory: str, name: str) -> str | None:
    """None if there is no such file, or none that can be read."""
    try:
        with open_regular(str(Path(directory, name))) as file:
            text = file.read(_BYTES_MAX + 1)
    except (OSError, ValueError):
        return None
    return text.decode(errors="replace") if len(text) <= _BYTES_MAX else None
