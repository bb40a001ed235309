"""What lies where an adapter should be, if it is none, and what to do about it."""

import itertools
import os
from pathlib import Path

from cluster.adapter_paths import CONFIG_FILE, MLX_FILE, TENSORS_FILE, TENSORS_FILES
from replica.adapters.adapter_config import refused

_LISTED_MAX = 1000


def check_present(path: str) -> None:
    """Raises AdapterRefused unless the directory has a configuration and tensors."""
    try:
        if not os.path.isdir(path):
            raise refused(path, _not_a_directory(Path(path)))
        for names in ((CONFIG_FILE,), TENSORS_FILES):
            if not any(os.path.exists(f"{path}/{name}") for name in names):
                raise refused(path, f"no {names[0]}{_instead(Path(path))}")
    except (OSError, ValueError) as error:
        # ValueError: the path contains a NUL character.
        raise refused(path, str(error)) from error


def _not_a_directory(path: Path) -> str:
    if not path.exists():
        return "no such directory"
    if path.suffix == ".zip":
        return "a zip archive; unpack it and name the directory"
    return "no such directory but a file; name the directory that it is in"


def _instead(directory: Path) -> str:
    """What was found there, and what to do."""
    for entry in sorted(itertools.islice(directory.iterdir(), _LISTED_MAX)):
        name = entry.name
        if name.endswith(".zip"):
            return f", but {name}; unpack it"
        if name.startswith("adapter_model-0") or name == f"{TENSORS_FILE}.index.json":
            return f", but {name}: shards; load it with PEFT and save it as one file"
        if name in ("adapters.npz", "lora.npz"):
            return f", but {name}; convert it with a newer mlx-lm, which writes {MLX_FILE}"
        if name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
            return f", but {name}: a whole model; save the adapter with PeftModel.save_pretrained"
        if (entry / CONFIG_FILE).exists():
            return f", but {name}/{CONFIG_FILE}; name that directory"
    return ""
