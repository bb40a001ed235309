"""A minimal model configuration and minimal adapters that pass validation, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from cluster.config import EngineConfig

LAYERS, HIDDEN = 2, 8


def write_model_config(directory: Path) -> str:
    """Writes a Llama's config.json, which suffices for `read_shape` but not for an engine."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def settled_config(model: str, **settings: Any) -> EngineConfig:
    """An EngineConfig with dtype and memory set, as an engine resolves them."""
    decided = {"device": "cpu", "dtype": "float32", "adapter_memory": 2**26, "host_memory": 2**26}
    return EngineConfig(model, **decided | settings)


def write_adapter(directory: Path, *, rank: int = 2, seed: int = 0) -> str:
    """Writes a LoRA on q_proj of each layer, with LAYERS × rank × 2 HIDDEN parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    rng = numpy.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for side, shape in (("A", (rank, HIDDEN)), ("B", (HIDDEN, rank))):
            weights = rng.standard_normal(shape).astype("float32")
            tensors[f"{module}.lora_{side}.weight"] = weights
    save_file(tensors, directory / "adapter_model.safetensors")
    return str(directory)
