"""What an adapter says of chats: its own template, the token that ends its answers, added tokens.

    chat_template.jinja, or chat_template in tokenizer_config.json ──┐  what differs from the base
    eos_token in tokenizer_config.json ──────────────────────────────┴──> tokenizer_config.json

The result depends on the files and the base model alone, so every replica gets the same digest.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.adapter_paths import CHAT_FILES, TEMPLATE_FILE, TOKENIZER_FILE
from cluster.errors import AdapterFailed
from cluster.file_copies import open_regular
from replica.adapters.adapter_config import refused, short
from replica.model.shape import Shape

TEMPLATE_BYTES_MAX = 128 * 2**10
_BYTES_MAX = 4 * 2**20
_NAMED_MAX = 3
_ADDED = "added_tokens.json"


class BaseText(Protocol):
    """The base model's tokenizer and chat template."""

    @property
    def default_template(self) -> str | None: ...

    @property
    def eos_text(self) -> str | None: ...

    def token_id(self, text: str) -> int | None:
        """None if it is not one token."""

    def template_error(self, template: str) -> str | None:
        """Why an adapter's template cannot be used. Blocking. Raises AdapterFailed."""


@dataclass(frozen=True, slots=True)
class Chat:
    """What differs from the base model. template: it has one of its own. eos_token: its own. text:
    the file that says so, part of the digest.
    """

    template: bool = False
    eos_token: int | None = None
    text: bytes = b""


NO_CHAT = Chat()


def tidy_chat(directory: str, base: BaseText | None, shape: Shape) -> Chat:
    """Rewrites the chat files as one, or none if nothing differs. Blocking. Leaves what it wrote
    before as it is. directory: of copies. Raises AdapterRefused, or OSError.
    """
    chat = NO_CHAT if base is None else _chat(directory, base, shape)
    if chat.text and _read(directory, TOKENIZER_FILE) != chat.text:
        new = Path(directory, ".new")
        new.write_bytes(chat.text)
        new.chmod(0o444)
        new.replace(f"{directory}/{TOKENIZER_FILE}")
    for name in CHAT_FILES:
        if name != TOKENIZER_FILE or not chat.text:
            Path(directory, name).unlink(missing_ok=True)
    return chat


def _chat(directory: str, base: BaseText, shape: Shape) -> Chat:
    settings = {}
    template, eos_text = _template(directory), _eos_text(directory)
    if template is not None and template != _one_line_less(base.default_template):
        settings["chat_template"] = template
        if len(template.encode(errors="replace")) > TEMPLATE_BYTES_MAX:
            raise refused(directory, f"its chat template is over {TEMPLATE_BYTES_MAX} bytes")
    eos_token = None
    if eos_text is not None and eos_text != base.eos_text:
        token = base.token_id(eos_text)
        if token is not None and token < shape.vocab and token not in shape.eos_tokens:
            settings["eos_token"], eos_token = eos_text, token
    text = json.dumps(settings, sort_keys=True).encode() if settings else b""
    return Chat("chat_template" in settings, eos_token, text)


def read_template(directory: str) -> str:
    """Of a version that has one. Raises AdapterFailed."""
    template = _template(directory)
    if template is None:
        raise AdapterFailed(f"{directory}: its chat template is gone", field="model")
    return template


def remarks(path: str, base: BaseText, vocabulary: int) -> list[str]:
    """What is not used, for whoever adds the adapter. vocabulary: the model's number of tokens."""
    found = []
    settings = _json(path, TOKENIZER_FILE)
    if _template(path) is None and settings.get("chat_template"):
        found.append("Its chat templates are not used: none is named default.")
    eos_text = _eos_text(path)
    if eos_text is not None and base.token_id(eos_text) is None:
        found.append(
            f"Its eos_token is not used: {short(eos_text)} is no token of the base model's."
        )
    reasons: dict[str, list[str]] = {}
    for token, number in sorted(_json(path, _ADDED).items()):
        known = base.token_id(token)
        if type(number) is not int or known == number:
            continue
        reason = "the base model's tokenizer does not have them"
        if number >= vocabulary:
            reason = f"they are beyond the base model's {vocabulary}"
        elif known is not None:
            reason = "they have other ids in the base model's tokenizer"
        reasons.setdefault(reason, []).append(token)
    for reason, tokens in reasons.items():
        named = ", ".join(map(short, tokens[:_NAMED_MAX]))
        more = f" and {len(tokens) - _NAMED_MAX} more" if len(tokens) > _NAMED_MAX else ""
        found.append(f"Its added tokens {named}{more} are not used: {reason}.")
    return found


def _template(directory: str) -> str | None:
    raw = _read(directory, TEMPLATE_FILE)
    text: Any = None if raw is None else raw.decode(errors="replace")
    if text is None:
        text = _json(directory, TOKENIZER_FILE).get("chat_template")
    if isinstance(text, list):  # several, each with a name
        named = [each for each in text if isinstance(each, dict) and each.get("name") == "default"]
        text = named[0].get("template") if named else None
    return _one_line_less(text) if isinstance(text, str) and text.strip() else None


def _one_line_less(text: str | None) -> str | None:
    """Jinja leaves out a last line break, too. Of several, all stay: what is kept is read again."""
    if text is None or text.endswith("\n\n"):
        return text
    return text.removesuffix("\n")


def _eos_text(directory: str) -> str | None:
    text = _json(directory, TOKENIZER_FILE).get("eos_token")
    if isinstance(text, dict):  # how an AddedToken is written
        text = text.get("content")
    return text if isinstance(text, str) and text else None


def _json(directory: str, name: str) -> dict[str, Any]:
    raw = _read(directory, name) or b"{}"
    try:
        value = json.loads(raw) if len(raw) <= _BYTES_MAX else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(directory: str, name: str) -> bytes | None:
    """The first `_BYTES_MAX` + 1 bytes. None if there is no such file, or none that can be read."""
    try:
        with open_regular(str(Path(directory, name))) as file:
            return file.read(_BYTES_MAX + 1)
    except (OSError, ValueError):
        return None
