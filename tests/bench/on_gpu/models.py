"""What is measured: a Llama-3.1-8B without weights, and adapters of it that are cheap to make."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.adapters.image import Layout
from replica.model.shape import PROJECTIONS, ModelShape, read_shape
from tests.bench.toys import toy_adapter

LLAMA_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}
# The same in every way but size, for a processor that interprets the kernels.
TINY: Mapping[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rope_scaling": {**LLAMA_8B["rope_scaling"], "original_max_position_embeddings": 128},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_model(directory: Path, config: Mapping[str, Any]) -> ModelShape:
    """Only `config.json`: the weights are made on the device (`load_format: dummy`)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    return read_shape(str(directory))


@contextmanager
def scratch(bytes: int) -> Iterator[Path]:
    """A directory in memory where there is room for `bytes` in it, else wherever files go."""
    shared = Path("/dev/shm")
    fits = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > bytes
    with tempfile.TemporaryDirectory(dir=shared if fits else None) as directory:
        yield Path(directory)


@dataclass(slots=True)
class Adapters:
    """PEFT files of random adapters, the tensors written once a rank.

    Adapters of one rank are hard links to the same tensors under another `lora_alpha`: their
    digests differ, and so do their outputs; the images made of them are whole copies.
    """

    directory: Path
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device

    def versions(self, ranks: Mapping[str, int]) -> dict[str, Version]:
        """Name → version. Digests are taken side by side, each reads the whole file."""
        paths = {name: self._write(name, i, rank) for i, (name, rank) in enumerate(ranks.items())}
        with ThreadPoolExecutor(8) as threads:
            infos = threads.map(lambda path: inspect(path, self.shape, 2**20), paths.values())
        return {
            name: Version(name, info.digest, path, info.rank, info.parameters)
            for (name, path), info in zip(paths.items(), infos, strict=True)
        }

    def _write(self, name: str, number: int, rank: int) -> str:
        path = self.directory / f"{name}-{rank}"
        if path.exists():
            return str(path)
        of = self.directory / f"rank-{rank}"
        if not of.exists():
            toy_adapter(of, self.shape, rank, rank, dtype=self.dtype, device=self.device)
        path.mkdir()
        os.link(of / TENSORS_FILE, path / TENSORS_FILE)
        config = json.loads((of / CONFIG_FILE).read_text())
        config["lora_alpha"] = rank * (1 + number / 64)
        (path / CONFIG_FILE).write_text(json.dumps(config))
        return str(path)


def layout(shape: ModelShape, rank: int, scale: float = 1.0) -> tuple[Layout, int]:
    """Of an image over all seven projections, and its length in elements."""
    size = (shape.layers, len(PROJECTIONS))
    widths = np.array([shape.projections[name] for name in PROJECTIONS], np.int64) * rank
    starts = (widths.sum(1).cumsum() - widths.sum(1))[None, :]
    layers = np.arange(shape.layers, dtype=np.int64)[:, None] * widths.sum()
    a_offset = layers + starts
    made = Layout(
        a_offset,
        a_offset + widths[:, 0],
        np.full(size, rank, np.int32),
        np.full(size, scale, np.float32),
    )
    return made, int(widths.sum()) * shape.layers
