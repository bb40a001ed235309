"""A model's id on the Hugging Face Hub → its directory in the Hub's cache on this node."""

import re
from pathlib import Path

from cluster.errors import ConfigError

_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Weights in other formats are not read.
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
_OTHER_WEIGHTS = ("consolidated*", "original/*")


def hub_name(model: str) -> str | None:
    """The name in `OWNER/NAME[@REVISION]`; None if `model` is a directory or no id."""
    match = None if Path(model).expanduser().exists() else _ID.fullmatch(model)
    return match and match["id"].rpartition("/")[2]


def download(model: str) -> str:
    """Downloads what is missing, with the token of `hf auth login` or HF_TOKEN. Without a network,
    the cache must have it all. Raises ConfigError.
    """
    # Imported here: it takes a second, and most models are directories.
    from huggingface_hub import snapshot_download

    match = _ID.fullmatch(model)
    assert match is not None
    try:
        return snapshot_download(
            match["id"],
            revision=match["revision"],
            allow_patterns=list(_FILES),
            ignore_patterns=list(_OTHER_WEIGHTS),
        )
    except (OSError, ValueError) as error:  # the Hub's own errors are among them
        revision = f" --revision {match['revision']}" if match["revision"] else ""
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--model {model}: no such directory, and not to be had from the Hub: {reason} (where "
            f"there is a network, `hf download {match['id']}{revision}` puts it into the cache)",
            field="model",
        ) from error
