"""Reads the model's shape from a checkpoint's `config.json`, without torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, ModelUnsupported
from replica.model.quantization import Quantization, read_quantization

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that share an input. One matmul and one LoRA launch compute a group."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""With tensor parallelism a rank has a part of these projections' inputs, and a part of the outputs
of all others."""

_BLOCKS = dict(zip(PROJECTIONS, ("self_attn",) * 4 + ("mlp",) * 3, strict=True))

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# `dynamic` and `longrope` change the rotation of a position as the sequence grows, so cached keys
# would be wrong.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The parameters that transformers reads for each type, besides `rope_theta`.
ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ROPE_OPTIONAL = (
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the model on one of `ranks` ranks: whole heads, and a slice of the MLP."""

    rank: int = 0
    ranks: int = 1

    def cut(self, size: int) -> slice:
        """This rank's slice of `size` rows or columns, which ranks share equally."""
        assert size % self.ranks == 0
        part = size // self.ranks
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True, slots=True)
class VocabularyModule:
    """The embedding or the head. inputs, outputs: vocabulary and hidden size, or the reverse."""

    head: bool
    inputs: int
    outputs: int

    @property
    def weight(self) -> tuple[int, int]:
        """Shape of its weight: [vocab, hidden]."""
        return (self.outputs, self.inputs) if self.head else (self.inputs, self.outputs)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions and options of one decoder.

    architecture: `model_type` of the checkpoint. context: longest sequence, in tokens.
    eos_tokens: union of `config.json` and `generation_config.json`.
    windows: per layer, how many tokens (itself included) a token attends to; None means all.
    rope: `rope_parameters` in the format of transformers 5.
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
    quantization: Quantization | None = None

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

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return GROUPS

    @property
    def modules(self) -> Mapping[str, tuple[int, str]]:
        """A linear module's path → (layer, projection), in the order of layers and projections."""
        return {
            f"model.layers.{layer}.{_BLOCKS[name]}.{name}": (layer, name)
            for layer in range(self.layers)
            for name in PROJECTIONS
        }

    @property
    def vocabulary(self) -> Mapping[str, VocabularyModule]:
        """By path. With tensor parallelism every rank has these whole."""
        return {
            "model.embed_tokens": VocabularyModule(False, self.vocab, self.hidden),
            "lm_head": VocabularyModule(True, self.hidden, self.vocab),
        }

    @property
    def cached_layers(self) -> int:
        return self.layers

    @property
    def parameters(self) -> int:
        """An upper bound: on one of several ranks, the head may be smaller."""
        matrices = sum(i * o for i, o in self.projections.values()) * self.layers
        return matrices + 2 * self.vocab * self.hidden

    def divided(self, ranks: int) -> "ModelShape":
        """Shape of the part that one of `ranks` ranks computes. Only the outputs of `o_proj` and
        `down_proj` are summed over ranks (Shoeybi et al., Megatron-LM, 2019). Raises ConfigError.
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


@dataclass(frozen=True, slots=True)
class TransformersShape:
    """A model that runs through transformers' own modules, as `module_walk` found it.

    layers: of its linear modules. attention_layers: the index that transformers gives each of its
    attention layers. windows: as in `ModelShape`, one for each of these. heads, kv_heads, head_dim:
    the largest of any layer.
    projections, modules: as in `ModelShape`. A projection's name is the path of its modules with
    `*` for the layer; a layer may lack it.
    vocabulary: by path, those of embedding and head that are plain.
    context: where the rotation of a position depends on the longest sequence, the length up to
    which it does not.
    """

    architecture: str
    layers: int
    attention_layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eos_tokens: frozenset[int]
    dtype: str
    windows: tuple[int | None, ...]
    parameters: int
    projections: Mapping[str, tuple[int, int]]
    modules: Mapping[str, tuple[int, str]]
    vocabulary: Mapping[str, VocabularyModule]

    @property
    def cached_layers(self) -> int:
        return len(self.attention_layers)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in self.projections)

    def divided(self, ranks: int) -> "TransformersShape":
        """Raises ConfigError unless it is whole."""
        if ranks > 1:
            raise ConfigError(
                f"tensor_parallel: {ranks} ranks cannot share {self.architecture}, which runs "
                f"through transformers (only {', '.join(ARCHITECTURES)} can be shared)",
                field="tensor_parallel",
            )
        return self


Shape = ModelShape | TransformersShape


def read_shape(model_dir: str) -> ModelShape:
    """Raises ModelUnsupported naming the missing file, the architecture or the feature."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelUnsupported(f"{model_dir}: no config.json", field="model")
    config = read_json(path)
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{path}: architecture {architecture!r} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})",
            field="model",
        )
    quantization = read_quantization(config, model_dir)
    if config.get("hidden_act", "silu") != "silu":
        raise ModelUnsupported(
            f"{path}: hidden_act {config['hidden_act']!r} is not supported (only silu)",
            field="model",
        )
    shape = _shape(config, read_eos_tokens(model_dir, config), str(path))
    return replace(shape, quantization=quantization)


def read_eos_tokens(model_dir: str, config: Mapping[str, Any]) -> frozenset[int]:
    """Of `config.json`'s content and `generation_config.json`. Raises ModelUnsupported."""
    generation = Path(model_dir) / "generation_config.json"
    eos_tokens = _tokens(config, str(Path(model_dir) / "config.json"))
    if generation.is_file():
        eos_tokens |= _tokens(read_json(generation), str(generation))
    return eos_tokens


def _shape(config: Mapping[str, Any], eos_tokens: frozenset[int], where: str) -> ModelShape:
    architecture = config["model_type"]
    hidden = _integer(config, "hidden_size", where)
    heads = _integer(config, "num_attention_heads", where)
    attention_bias = architecture == "qwen2" or bool(config.get("attention_bias", False))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ModelUnsupported(f"{where}: dtype {dtype!r} is not supported", field="model")
    return ModelShape(
        architecture=architecture,
        layers=_integer(config, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        kv_heads=_integer(config, "num_key_value_heads", where, heads),
        head_dim=_integer(
            config, "head_dim", where, 128 if architecture == "qwen3" else hidden // heads
        ),
        intermediate=_integer(config, "intermediate_size", where),
        vocab=_integer(config, "vocab_size", where),
        context=_integer(config, "max_position_embeddings", where),
        eos_tokens=eos_tokens,
        dtype=dtype,
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias and architecture != "mistral",
        output_bias=attention_bias and architecture in ("llama", "qwen3"),
        mlp_bias=architecture == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=architecture == "qwen3",
        windows=_windows(config, where),
        rope=_rope(config, where),
    )


def _windows(config: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """Follows transformers' configuration classes of the four architectures."""
    layers = _integer(config, "num_hidden_layers", where)
    if config["model_type"] == "llama":
        return (None,) * layers
    mistral = config["model_type"] == "mistral"
    window: int | None = None
    used = mistral or config.get("use_sliding_window")
    if used and config.get("sliding_window", 4096) is not None:  # null: no window
        window = _integer(config, "sliding_window", where, 4096)
    if mistral:
        return (window,) * layers
    first = config.get("max_window_layers", 28)
    if window is not None and not _is_integer(first):
        raise _wrong(where, "max_window_layers", first, "an integer")
    kinds = config.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(layers)
    ]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        raise ModelUnsupported(f"{where}: layer_types {kinds} are not supported", field="model")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    # transformers 5 writes `rope_parameters`; earlier ones write `rope_scaling` and `rope_theta`.
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise _wrong(where, name, given, "a mapping")
    rope = dict(given)
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
    inside = f"{where}: {name}"
    _number(rope, "rope_theta", inside if "rope_theta" in given else where)
    if rope["rope_type"] != "default":
        needed = ROPE_NUMBERS[rope["rope_type"]]
        for number in (*needed, *filter(rope.get, ROPE_OPTIONAL)):
            _number(rope, number, inside)
    return rope


def _tokens(config: Mapping[str, Any], where: str) -> frozenset[int]:
    value = config.get("eos_token_id")
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_integer(token) and token >= 0 for token in tokens):
        raise _wrong(where, "eos_token_id", value, "a token or a list of tokens")
    return frozenset(tokens)


def _integer(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A positive integer. The default, if given, also replaces null."""
    value = _given(config, name, where, default)
    if not _is_integer(value) or value < 1:
        raise _wrong(where, name, value, "a positive integer")
    return int(value)


def _number(
    config: Mapping[str, Any], name: str, where: str, default: float | None = None
) -> float:
    """A positive number. The default, if given, also replaces null."""
    value = _given(config, name, where, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise _wrong(where, name, value, "a positive number")
    return float(value)


def _given(config: Mapping[str, Any], name: str, where: str, default: float | None) -> Any:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if name not in config:
        raise ModelUnsupported(f"{where}: no {name!r}", field="model")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(where: str, name: str, value: Any, wanted: str) -> ModelUnsupported:
    return ModelUnsupported(f"{where}: {name} {value!r} is not {wanted}", field="model")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ModelUnsupported naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnsupported(f"{path}: {error}", field="model") from error
    if not isinstance(data, dict):
        raise ModelUnsupported(f"{path}: not a JSON object", field="model")
    return data
