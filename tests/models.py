"""Tiny random checkpoints and adapters, written by transformers and PEFT."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
BOS, EOS = 0, 1


def make_model(
    directory: str | Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    **overrides: Any,
) -> str:
    """Writes an HF checkpoint with random weights and a byte-level tokenizer. Returns its path.

    shard_bytes: the size of the files that the tensors are split into. overrides: fields of the
    HF config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        # Large enough for attention and norms to affect the logits.
        "initializer_range": 0.1,
    }
    if architecture == "mistral":
        settings["sliding_window"] = None
    settings |= overrides
    if architecture == "qwen2":
        settings.pop("head_dim", None)  # Qwen2 has no such field: it is hidden / heads.
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            # Transformers initializes norms to 1 and biases to 0, which would hide a mix-up.
            if "norm" in name:
                torch.nn.init.normal_(weight, 1.0, 0.2)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, 0.0, 0.2)
    path = Path(directory)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=shard_bytes or "5GB")
    write_tokenizer(path)
    return str(path)


def write_tokenizer(path: Path) -> None:
    """Writes the byte-level tokenizer and chat template of `make_model`'s checkpoints."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token="<|pad|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def make_adapter(
    directory: str | Path,
    model_dir: str | Path,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 1,
    strength: float = 0.1,
    saving: Mapping[str, Any] | None = None,
    trained: bool = False,
    **settings: Any,
) -> str:
    """Writes a PEFT adapter with random A and B, so that it changes the logits. Returns its path.

    strength: standard deviation of A and B, and of what is added to `modules_to_save` if they are
    trained. saving: arguments of `save_pretrained`. settings: further fields of `LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(targets),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        task_type="CAUSAL_LM",
        **settings,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 uses an attribute that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(weight.shape, generator=generator) * strength
                weight.copy_(weight * (1 + drawn) if "magnitude" in name else drawn)
            elif trained and ".modules_to_save." in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * strength)
    path = Path(directory)
    model.save_pretrained(path, **(saving or {}))
    return str(path)


def edit_config(directory: str | Path, file: str = "config.json", **fields: Any) -> None:
    """Changes fields of a JSON file in place. None removes a field."""
    path = Path(directory) / file
    data = json.loads(path.read_text())
    for key, value in fields.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def edit_tensors(directory: str | Path, file: str, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of a safetensors file in place, by name suffix. None removes a tensor."""
    path = Path(directory) / file
    data = load_file(path)
    for suffix, tensor in tensors.items():
        (name,) = (n for n in data if n.endswith(suffix))
        if tensor is None:
            del data[name]
        else:
            data[name] = tensor
    save_file(data, path)
