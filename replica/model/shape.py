"""Reads the model's shape from a checkpoint's `config.json`, without torch."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, ModelUnsupported
from replica.model.config_fields import integer, is_integer, number, wrong
from replica.model.families import (
    ARCHITECTURES,
    EXPERT_ALIGNMENT,
    GEMMAS,
    PARTLY,
    Mixture,
    check_fields,
    inner_name,
    is_elsewhere,
    read_activation,
    read_options,
    read_rope,
    read_windows,
    stretched_context,
)
from replica.model.quantization import Quantization, read_quantization

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that share an input. One matmul and one LoRA launch compute a group."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""With tensor parallelism a rank has a part of these projections' inputs, and a part of the outputs
of all others."""

FUSED_GROUPS = (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",))
"""`GROUPS` where the checkpoint stores a group that shares an input as one projection."""

BLOCKS = ("self_attn", "self_attn", "mlp", "mlp")
"""The checkpoint's module of each group's projections."""

DTYPES = ("float32", "bfloat16", "float16")

_OUTPUT_BIASES = ("llama", "qwen3", "granite", *GEMMAS, "qwen3_moe")
"""Families whose `attention_bias` is also one of `o_proj`."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the model on one of `ranks` ranks: whole heads, and a slice of the MLP or of each
    expert.
    """

    rank: int = 0
    ranks: int = 1

    def cut(self, size: int) -> slice:
        """This rank's slice of `size` rows or columns, which ranks share equally."""
        assert size % self.ranks == 0
        part = size // self.ranks
        return slice(self.rank * part, (self.rank + 1) * part)

    def cuts(self, sizes: Sequence[int]) -> list[slice]:
        """This rank's slice of each of several parts, which follow each other."""
        ends = list(itertools.accumulate(sizes))
        own = [self.cut(size) for size in sizes]
        return [
            slice(end - size + cut.start, end - size + cut.stop)
            for end, size, cut in zip(ends, sizes, own, strict=True)
        ]


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
    window_rope: of layers with a window; None: as of all others.
    softmax_scale, softcap: of the products of queries and keys.
    activation: of the gate, `silu` or `gelu_tanh`. fused_projections: see `FUSED_GROUPS`.
    embed_scale, residual_scale: what embeddings, and each output of attention and MLP, are
    multiplied by. embed_scale_rounded: to the dtype, before.
    logits_divisor, final_softcap: logits are divided by one, then bounded by the other.
    post_norms: outputs of attention and MLP are normed. norm_offset: added to norms' weights.
    mixture: None: every token goes through one MLP. `intermediate` is of each expert.
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
    softmax_scale: float
    activation: str = "silu"
    fused_projections: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    embed_scale_rounded: bool = False
    logits_divisor: float = 1.0
    softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    norm_offset: float = 0.0
    window_rope: Mapping[str, Any] | None = None
    mixture: Mixture | None = None
    quantization: Quantization | None = None

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Name → (in_features, out_features), in the order of `groups`. Experts are left out: no
        adapter targets them.
        """
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused_projections:
            return {
                "qkv_proj": (self.hidden, queries + 2 * values),
                "o_proj": (queries, self.hidden),
                "gate_up_proj": (self.hidden, 2 * self.intermediate),
                "down_proj": (self.intermediate, self.hidden),
            }
        attention = {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, values),
            "v_proj": (self.hidden, values),
            "o_proj": (queries, self.hidden),
        }
        if self.mixture is not None:
            return attention
        return attention | {
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def parts(self, projection: str) -> tuple[int, ...]:
        """Sizes of a projection's outputs that ranks share one by one."""
        if projection == "qkv_proj":
            values = self.kv_heads * self.head_dim
            return self.heads * self.head_dim, values, values
        if projection == "gate_up_proj":
            return self.intermediate, self.intermediate
        return (self.projections[projection][1],)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        if self.mixture is not None:
            return GROUPS[:2]  # those of attention
        return FUSED_GROUPS if self.fused_projections else GROUPS

    @property
    def modules(self) -> Mapping[str, tuple[int, str]]:
        """A linear module's path → (layer, projection), in the order of layers and projections."""
        return {
            f"model.layers.{layer}.{block}.{name}": (layer, name)
            for layer in range(self.layers)
            for block, group in zip(BLOCKS, self.groups, strict=False)
            for name in group
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
        layer = sum(i * o for i, o in self.projections.values())
        if self.mixture is not None:  # a row of the router, gate, up and down for each expert
            layer += self.mixture.experts * self.hidden * (1 + 3 * self.intermediate)
        return self.layers * layer + 2 * self.vocab * self.hidden

    def divided(self, ranks: int) -> "ModelShape":
        """Shape of the part that one of `ranks` ranks computes. Only the outputs of `o_proj` and
        `down_proj`, or experts, are summed over ranks (Shoeybi et al., Megatron-LM, 2019). Raises
        ConfigError.
        """
        for name in ("heads", "kv_heads", "intermediate"):
            if getattr(self, name) % ranks:
                raise ConfigError(
                    f"tensor_parallel: {ranks} ranks cannot share the model's {name} equally, "
                    f"there are {getattr(self, name)}",
                    field="tensor_parallel",
                )
        inner = self.intermediate // ranks
        if self.mixture is not None and inner % EXPERT_ALIGNMENT:
            raise ConfigError(
                f"tensor_parallel: {ranks} ranks would have {inner} of each expert's "
                f"{self.intermediate} columns, which is no multiple of {EXPERT_ALIGNMENT}",
                field="tensor_parallel",
            )
        return replace(
            self,
            heads=self.heads // ranks,
            kv_heads=self.kv_heads // ranks,
            intermediate=inner,
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
    parameters: also of a quantized checkpoint, whose weights are dequantized.
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
    quantization: Quantization | None = None

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
                f"through transformers (only our own decoders can be shared)",
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
    shape = _shape(config, read_eos_tokens(model_dir, config), str(path))
    return replace(shape, quantization=quantization)


def is_covered(config: Mapping[str, Any]) -> bool:
    """False for a configuration of our own families that runs through transformers.

    config: content of `config.json`, of an architecture in `ARCHITECTURES`.
    """
    if config["model_type"] not in PARTLY:
        return not is_elsewhere(config)
    try:
        _shape(config, frozenset(), "")
    except ModelUnsupported:
        return False
    return True


def read_eos_tokens(model_dir: str, config: Mapping[str, Any]) -> frozenset[int]:
    """Of `config.json`'s content and `generation_config.json`. Raises ModelUnsupported."""
    generation = Path(model_dir) / "generation_config.json"
    eos_tokens = _tokens(config, str(Path(model_dir) / "config.json"))
    if generation.is_file():
        eos_tokens |= _tokens(read_json(generation), str(generation))
    return eos_tokens


def _shape(config: Mapping[str, Any], eos_tokens: frozenset[int], where: str) -> ModelShape:
    check_fields(config, where)
    architecture = config["model_type"]
    hidden = integer(config, "hidden_size", where)
    heads = integer(config, "num_attention_heads", where)
    head_dim = 128 if architecture == "qwen3" else hidden // heads
    head_dim = integer(config, "head_dim", where, head_dim)
    attention_bias = architecture == "qwen2" or bool(config.get("attention_bias", False))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ModelUnsupported(f"{where}: dtype {dtype!r} is not supported", field="model")
    context, rope = integer(config, "max_position_embeddings", where), read_rope(config, where)
    return ModelShape(
        architecture=architecture,
        layers=integer(config, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        kv_heads=integer(config, "num_key_value_heads", where, heads),
        head_dim=head_dim,
        intermediate=integer(config, inner_name(config), where),
        vocab=integer(config, "vocab_size", where),
        context=max(context, stretched_context(rope)),
        eos_tokens=eos_tokens,
        dtype=dtype,
        norm_eps=number(config, "rms_norm_eps", where, 1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", architecture in GEMMAS)),
        qkv_bias=attention_bias and architecture != "mistral",
        output_bias=attention_bias and architecture in _OUTPUT_BIASES,
        mlp_bias=architecture in ("llama", "granite") and bool(config.get("mlp_bias", False)),
        qk_norm=architecture in ("qwen3", "gemma3_text", "qwen3_moe"),
        windows=read_windows(config, where),
        rope=rope,
        activation=read_activation(config, where),
        **{"softmax_scale": head_dim**-0.5} | read_options(config, where),
    )


def _tokens(config: Mapping[str, Any], where: str) -> frozenset[int]:
    value = config.get("eos_token_id")
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    if not all(is_integer(token) and token >= 0 for token in tokens):
        raise wrong(where, "eos_token_id", value, "a token or a list of tokens")
    return frozenset(tokens)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ModelUnsupported naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnsupported(f"{path}: {error}", field="model") from error
    if not isinstance(data, dict):
        raise ModelUnsupported(f"{path}: not a JSON object", field="model")
    return data
