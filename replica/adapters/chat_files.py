"""What an adapter says of chats: its own template, the token that ends its answers, added tokens.

    chat_template.jinja, or chat_template in tokenizer_config.json ──┐
    eos_token in tokenizer_config.json ──────────────────────────────┤  what differs from the base
    added tokens (see added_tokens.py) ──────────────────────────────┴──> tokenizer_config.json

The result depends on the files and the base model alone, so every replica gets the same digest.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.adapter_paths import CHAT_FILES, TEMPLATE_FILE, TOKENIZER_FILE
from cluster.errors import AdapterFailed
from cluster.values import AddedToken
from replica.adapters.adapter_config import refused, short
from replica.adapters.added_tokens import (
    MEMBER,
    BaseVocabulary,
    added_remarks,
    as_member,
    content_of,
    own_tokens,
    read_added,
    why_not,
)
from replica.adapters.json_files import read_object, read_start
from replica.model.shape import Shape

TEMPLATE_BYTES_MAX = 128 * 2**10


class BaseText(BaseVocabulary, Protocol):
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
    """What differs from the base model. template: it has one of its own. eos_token: its own.
    added_tokens: it has some. text: the file that says so, part of the digest. refusal: why it
    cannot be served.
    """

    template: bool = False
    eos_token: int | None = None
    added_tokens: bool = False
    text: bytes = b""
    refusal: str | None = None


NO_CHAT = Chat()


def tidy_chat(
    directory: str, base: BaseText | None, shape: Shape, *, with_tokens: bool = True
) -> Chat:
    """Rewrites the chat files as one, or none if nothing differs. Blocking. Leaves what it wrote
    before as it is. directory: of copies. with_tokens: False: without added tokens. Raises
    AdapterRefused, or OSError.
    """
    if not _has_any(directory):
        return NO_CHAT
    chat = NO_CHAT if base is None else read_chat(directory, base, shape, with_tokens=with_tokens)
    if chat.text and read_start(directory, TOKENIZER_FILE) != chat.text:
        new = Path(directory, ".new")
        new.write_bytes(chat.text)
        new.chmod(0o444)
        new.replace(f"{directory}/{TOKENIZER_FILE}")
    for name in CHAT_FILES:
        if name != TOKENIZER_FILE or not chat.text:
            Path(directory, name).unlink(missing_ok=True)
    return chat


def read_chat(directory: str, base: BaseText, shape: Shape, *, with_tokens: bool = True) -> Chat:
    """Changes no file. with_tokens: as in `tidy_chat`. Blocking. Raises AdapterRefused."""
    given = read_object(directory, TOKENIZER_FILE)
    settings: dict[str, Any] = {}
    template, eos_text = _template(directory, given), content_of(given.get("eos_token"))
    if template is not None and template != _one_line_less(base.default_template):
        settings["chat_template"] = template
        if len(template.encode(errors="replace")) > TEMPLATE_BYTES_MAX:
            raise refused(directory, f"its chat template is over {TEMPLATE_BYTES_MAX} bytes")
    tokens: list[AddedToken] = []
    if with_tokens:
        tokens = own_tokens(read_added(directory, given), given, base, shape.vocab)
    if tokens:
        settings[MEMBER] = as_member(tokens)
    own, eos_token = {token.text: token.id for token in tokens}, None
    if eos_text is not None and (eos_text in own or eos_text != base.eos_text):
        token = own.get(eos_text, base.token_id(eos_text))
        if token is not None and token < shape.vocab and token not in shape.eos_tokens:
            settings["eos_token"], eos_token = eos_text, token
    text = json.dumps(settings, sort_keys=True).encode() if settings else b""
    refusal = why_not(tokens, base, shape.vocab)
    return Chat("chat_template" in settings, eos_token, bool(tokens), text, refusal)


def why_no_chat(chat: Chat, directory: str, base: BaseText | None) -> str | None:
    """Why an adapter whose chat files say this cannot be served. Blocking. Raises AdapterFailed."""
    if chat.refusal is not None or not chat.template or base is None:
        return chat.refusal
    wrong = base.template_error(read_template(directory))
    return None if wrong is None else f"has a chat template that cannot be used: {wrong}"


def read_template(directory: str) -> str:
    """Of a version that has one. Raises AdapterFailed."""
    template = _template(directory, read_object(directory, TOKENIZER_FILE))
    if template is None:
        raise AdapterFailed(f"{directory}: its chat template is gone", field="model")
    return template


def read_added_tokens(directory: str) -> list[AddedToken]:
    """Of a version that has some. Raises AdapterFailed."""
    tokens = read_added(directory, read_object(directory, TOKENIZER_FILE))
    if not tokens:
        raise AdapterFailed(f"{directory}: its added tokens are gone", field="model")
    return tokens


def remarks(path: str, base: BaseText, vocabulary: int) -> list[str]:
    """What is not used, for whoever adds the adapter. vocabulary: the model's number of tokens."""
    if not _has_any(path):
        return []
    settings = read_object(path, TOKENIZER_FILE)
    found, tokens = [], read_added(path, settings)
    if _template(path, settings) is None and settings.get("chat_template"):
        found.append("Its chat templates are not used: none is named default.")
    eos_text = content_of(settings.get("eos_token"))
    own = any(token.text == eos_text for token in tokens)
    if eos_text is not None and not own and base.token_id(eos_text) is None:
        found.append(
            f"Its eos_token is not used: {short(eos_text)} is no token of the base model's."
        )
    return found + added_remarks(path, settings, tokens, vocabulary)


def _has_any(directory: str) -> bool:
    """False for most adapters."""
    return any(os.path.lexists(f"{directory}/{name}") for name in CHAT_FILES)


def _template(directory: str, settings: Mapping[str, Any]) -> str | None:
    raw = read_start(directory, TEMPLATE_FILE)
    text = settings.get("chat_template") if raw is None else raw.decode(errors="replace")
    if isinstance(text, list):  # several, each with a name
        named = [each for each in text if isinstance(each, dict) and each.get("name") == "default"]
        text = named[0].get("template") if named else None
    return _one_line_less(text) if isinstance(text, str) and text.strip() else None


def _one_line_less(text: str | None) -> str | None:
    """Jinja leaves out a last line break, too. Of several, all stay: what is kept is read again."""
    if text is None or text.endswith("\n\n"):
        return text
    return text.removesuffix("\n")
