"""Random checkpoints and adapters for benchmarks, with valid shapes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.model.shape import PROJECTIONS, ModelShape, read_shape

_BLOCK = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
_BLOCK |= {"o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def toy_model(directory: Path, hidden: int, layers: int, context: int) -> ModelShape:
    """Writes a random fp32 Llama without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 1),
        num_key_value_heads=max(hidden // 64, 1),
        max_position_embeddings=context,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return read_shape(str(directory))


def toy_adapter(
    directory: Path,
    shape: ModelShape,
    rank: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> str:
    """Writes a PEFT adapter of all projections, strong enough to change the logits visibly.

    device: draws the weights; a CPU takes long for a large adapter.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        drawn = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return drawn.mul_(0.3 / rank**0.5).cpu()

    tensors = {}
    for layer in range(shape.layers):
        for name in PROJECTIONS:
            fan_in, fan_out = shape.projections[name]
            prefix = f"base_model.model.model.layers.{layer}.{_BLOCK[name]}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = draw(rank, fan_in)
            tensors[f"{prefix}.lora_B.weight"] = draw(fan_out, rank)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return str(directory)


def toy_version(directory: Path, shape: ModelShape, rank: int, seed: int) -> Version:
    """Writes such an adapter, and names its version after the directory."""
    path = toy_adapter(directory, shape, rank, seed)
    info = inspect(path, shape, rank_max=64)
    return Version(directory.name, info.digest, path, info.rank, info.parameters)
