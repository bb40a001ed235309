"""Reads a checkpoint's tokenizer, whichever files it has."""

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ModelUnsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_tokenizer(model_dir: str) -> "PreTrainedTokenizerFast":
    """Raises ModelUnsupported if the directory has none that `tokenizers` can run, and what
    transformers raises for a broken `tokenizer.json`.
    """
    if (Path(model_dir) / "tokenizer.json").is_file():
        # AutoTokenizer would import torch, which the HTTP process can do without.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    from transformers import AutoTokenizer

    try:
        # From `tokenizer.model`, or `vocab.json` and `merges.txt`.
        found = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        found.backend_tokenizer.to_str()
    except Exception as error:  # the libraries vary, and some tokenizers are Python code alone
        reason = " ".join(str(error).split())
        raise ModelUnsupported(
            f"{model_dir}: has no tokenizer.json, and transformers makes none of its other files: "
            f"{reason}"
        ) from error
    return found
