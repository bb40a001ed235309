"""What a checkpoint's `config.json` says the model is; read without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, ModelUnsupported

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that share an input: one matmul, and one LoRA launch, covers a group."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""With tensor parallelism each rank has a part of their inputs, and of all others' outputs."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# `dynamic` and `longrope` turn the same position differently as a sequence grows: cached keys
# would be wrong then.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the model this rank of `ranks` holds: whole heads, and a cut of the MLP."""

    rank: int = 0
    ranks: int = 1

    def cut(self, size: int) -> slice:
        """This rank's of `size` rows or columns that all ranks share equally."""
        assert size % self.ranks == 0
        part = size // self.ranks
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions and switches of one decoder.

    architecture: `model_type` in HF's words. context: longest sequence, in tokens.
    eos_tokens: of `config.json` and `generation_config.json` together.
    windows: per layer, how many tokens (itself included) a token sees; None sees all.
    rope: `rope_parameters` as transformers 5 writes them.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    eos_tokens: frozenset[int]
    dtype: str
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: Mapping[str, Any]

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Name → (in_features, out_features), in the order of `PROJECTIONS`."""
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, values),
            "v_proj": (self.hidden, values),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def divided(self, ranks: int) -> "ModelShape":
        """What one of `ranks` ranks computes: a model of its own, but for the sums that `o_proj`
        and `down_proj` give (Shoeybi et al., Megatron-LM, 2019). Raises ConfigError.
        """
        for name in ("heads", "kv_heads", "intermediate"):
            if getattr(self, name) % ranks:
                raise ConfigError(
                    f"tensor_parallel: {ranks} ranks cannot share the model's {name} equally, "
                    f"there are {getattr(self, name)}",
                    field="tensor_parallel",
                )
        return replace(
            self,
            heads=self.heads // ranks,
            kv_heads=self.kv_heads // ranks,
            intermediate=self.intermediate // ranks,
        )


def read_shape(model_dir: str) -> ModelShape:
    """Raises ModelUnsupported naming the missing file, the architecture or the feature."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelUnsupported(f"{model_dir}: no config.json", field="model")
    config = _read_json(path)
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{path}: architecture {architecture!r} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})",
            field="model",
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelUnsupported(f"{path}: quantization {method!r} is not supported", field="model")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelUnsupported(
            f"{path}: hidden_act {config['hidden_act']!r} is not supported (only silu)",
            field="model",
        )
    generation = Path(model_dir) / "generation_config.json"
    try:
        return _shape(config, _read_json(generation) if generation.is_file() else {}, str(path))
    except KeyError as missing:
        raise ModelUnsupported(f"{path}: no {missing.args[0]!r}", field="model") from None


def _shape(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelShape:
    architecture = config["model_type"]
    heads = config["num_attention_heads"]
    attention_bias = architecture == "qwen2" or bool(config.get("attention_bias", False))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ModelUnsupported(f"{where}: dtype {dtype!r} is not supported", field="model")
    return ModelShape(
        architecture=architecture,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim")
        or (128 if architecture == "qwen3" else config["hidden_size"] // heads),
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        eos_tokens=_tokens(config.get("eos_token_id")) | _tokens(generation.get("eos_token_id")),
        dtype=dtype,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias and architecture != "mistral",
        output_bias=attention_bias and architecture in ("llama", "qwen3"),
        mlp_bias=architecture == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=architecture == "qwen3",
        windows=_windows(config, where),
        rope=_rope(config, where),
    )


def _windows(config: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """As transformers' configurations of the four architectures decide it."""
    layers: int = config["num_hidden_layers"]
    window: int | None
    match config["model_type"]:
        case "llama":
            return (None,) * layers
        case "mistral":
            window = config.get("sliding_window", 4096)
            return (window,) * layers
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(layers)
    ]
    if len(kinds) != layers or not {"sliding_attention", "full_attention"}.issuperset(kinds):
        raise ModelUnsupported(f"{where}: layer_types {kinds} are not supported", field="model")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    # `rope_parameters` since transformers 5; `rope_scaling` beside `rope_theta` before it.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelUnsupported(
            f"{where}: rope type {rope['rope_type']!r} is not supported "
            f"(supported: {', '.join(ROPE_TYPES)})",
            field="model",
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelUnsupported(
            f"{where}: partial_rotary_factor {partial} is not supported", field="model"
        )
    return rope


def _tokens(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnsupported(f"{path}: {error}", field="model") from error
    if not isinstance(data, dict):
        raise ModelUnsupported(f"{path}: not a JSON object", field="model")
    return data
