"""Where an adapter is added from: a path or a URL (s3://, hf:// …), and which ones are allowed."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.errors import BadRequest

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
# PEFT's pickle and mlx-lm's safetensors, which are rewritten as TENSORS_FILE.
PICKLE_FILE, MLX_FILE = "adapter_model.bin", "adapters.safetensors"
# An adapter has the first of these.
TENSORS_FILES = (TENSORS_FILE, PICKLE_FILE, MLX_FILE)
# Of its chats, and not every adapter has them. A store keeps the second alone, with what is used.
TEMPLATE_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
ADDED_FILE, VOCABULARY_FILE = "added_tokens.json", "tokenizer.json"
CHAT_FILES = (TEMPLATE_FILE, TOKENIZER_FILE, ADDED_FILE, VOCABULARY_FILE)
# Of a `tokenizer.json` no more is copied: added tokens come first, megabytes of vocabulary after.
HEAD_BYTES = 2 * 2**20
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# Begins the URL of what a client sent: the digest follows.
UPLOADED = "upload://"


def files_of(directory: str) -> tuple[str, ...]:
    """The names of the adapter's configuration and tensors, which may not be there, and of those
    of its chat files that are.
    """
    found = (name for name in TENSORS_FILES if os.path.lexists(f"{directory}/{name}"))
    chat = (name for name in CHAT_FILES if os.path.isfile(f"{directory}/{name}"))
    return CONFIG_FILE, next(found, TENSORS_FILE), *chat


def is_url(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """The absolute path of a path or a file:// URL. `..` stays in it, because only the kernel can
    resolve it behind a symlink."""
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    return os.path.join(os.getcwd(), uri).rstrip(os.sep) or os.sep


def check_allowed(uri: str, roots: Sequence[str]) -> None:
    """Raises BadRequest naming `lora_path` unless the adapter's files are under one of the roots.

    Symlinks and `..` are resolved first, in roots, directory and files. Files may be links to the
    blobs of the Hub's cache that a root is a snapshot of. The message is the same whether or not a
    path outside exists. A URL needs a root that is a URL and a prefix of it.
    """
    links = []
    for root in roots:
        reason = _outside(uri, root)
        if reason is None:
            return
        links.append(reason)
    what = next(filter(None, links), "is outside the allowed adapter roots")
    none = "" if roots else " (none is configured: --adapter-root)"
    plain = "; give an absolute path" if not (is_url(uri) or uri.startswith(("/", "file:"))) else ""
    hub = f", or hf://{uri} if it is on the Hub" if plain and _HUB_ID.fullmatch(uri) else ""
    raise BadRequest(f"lora_path: {uri!r} {what}{none}{plain}{hub}", field="lora_path")


def _outside(uri: str, root: str) -> str | None:
    """None if it lies under the root. Else what leads out of it, or ''."""
    if "\0" in uri:
        return ""
    if is_url(uri) or is_url(root):
        plain = "::" not in uri and ".." not in uri.split("/")
        return None if plain and (uri + "/").startswith(root.rstrip("/") + "/") else ""
    top = os.path.realpath(local_path(root))
    path = local_path(uri)
    if not _contains(top, os.path.realpath(path)):
        plain = ".." not in path.split(os.sep)
        beneath = plain and (_contains(local_path(root), path) or _contains(top, path))
        return "is behind a link out of the allowed adapter roots" if beneath else ""
    for name in files_of(path):
        file = os.path.realpath(os.path.join(path, name))
        if not _contains(top, file) and not any(_contains(each, file) for each in _blobs(top)):
            return f"has {name} as a link out of the allowed adapter roots"
    return None


def _blobs(top: str) -> list[str]:
    """Where the files of a snapshot in the Hub's cache lie: `…/models--A--B/blobs`."""
    return [
        str(parent.parent / "blobs")
        for parent in (Path(top), *Path(top).parents)
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]


def _contains(top: str, path: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)
