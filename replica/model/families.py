"""How the families of our own decoder differ: what `config.json` says beyond dimensions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ModelUnsupported
from replica.model.config_fields import integer, is_integer, number, wrong

GEMMAS = ("gemma2", "gemma3_text")
MIXTURES = ("mixtral", "qwen3_moe")
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", *GEMMAS, *MIXTURES)
# `dynamic` and `longrope` change the rotation of a position as the sequence grows, so cached keys
# would be wrong.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The parameters that transformers reads for each type, besides `rope_theta`.
ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_SILU = "silu"
_ORIGINAL_CONTEXT = "original_max_position_embeddings"
ROPE_OPTIONAL = (
    _ORIGINAL_CONTEXT,
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)

_COMMON = """
architectures attention_dropout auto_map bos_token_id dtype eos_token_id head_dim hidden_act
hidden_size initializer_range intermediate_size max_position_embeddings model_type
num_attention_heads num_hidden_layers num_key_value_heads pad_token_id quantization_config
rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype
transformers_version use_cache vocab_size _name_or_path
"""
"""Fields of `config.json` that are read for every family, or change nothing that is computed."""
_GRANITE = """
attention_bias attention_multiplier embedding_multiplier logits_scaling mlp_bias residual_multiplier
"""
_PHI3 = """
embd_pdrop original_max_position_embeddings partial_rotary_factor resid_pdrop sliding_window
"""
_GEMMA = """
attention_bias attn_logit_softcapping cache_implementation final_logit_softcapping
hidden_activation layer_types query_pre_attn_scalar sliding_window
"""
_GEMMA2 = f"{_GEMMA} sliding_window_size"
_GEMMA3 = f"{_GEMMA} rope_local_base_freq sliding_window_pattern _sliding_window_pattern"
_MIXTRAL = """
num_experts_per_tok num_local_experts output_router_logits router_aux_loss_coef router_jitter_noise
sliding_window
"""
_QWEN3_MOE = """
attention_bias decoder_sparse_step max_window_layers mlp_only_layers moe_intermediate_size
norm_topk_prob num_experts num_experts_per_tok num_local_experts output_router_logits
router_aux_loss_coef sliding_window use_sliding_window
"""
_NEEDED = "num_key_value_heads rms_norm_eps"
_GEMMA_NEEDED = f"{_NEEDED} head_dim query_pre_attn_scalar sliding_window"
_GEMMA2_NEEDED = f"{_GEMMA_NEEDED} attn_logit_softcapping final_logit_softcapping"
_GEMMA3_THETAS = {
    "full_attention": ("rope_theta", 1e6),
    "sliding_attention": ("rope_local_base_freq", 1e4),
}
"""Kind of a layer → where its `rope_theta` was in earlier versions, and the default."""


EXPERT_ALIGNMENT = 8
"""Grouped matmuls take rows of multiples of 16 bytes: this many elements of 2 bytes."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts that take the place of each layer's MLP. active: how many a token goes through.

    normalized: the weights of a token's experts sum to 1. rounded: weights are of the model's
    dtype, else float32.
    """

    experts: int
    active: int
    normalized: bool
    rounded: bool


@dataclass(frozen=True, slots=True)
class _Fields:
    """Names of fields. known: beside `_COMMON`. needed: those whose defaults in transformers are
    not read here.
    """

    known: str
    needed: str = _NEEDED


PARTLY: Mapping[str, _Fields] = {
    "granite": _Fields(_GRANITE),
    "phi3": _Fields(_PHI3),
    "gemma2": _Fields(_GEMMA2, _GEMMA2_NEEDED),
    "gemma3_text": _Fields(_GEMMA3, _GEMMA_NEEDED),
    "mixtral": _Fields(_MIXTRAL),
    "qwen3_moe": _Fields(_QWEN3_MOE),
}
"""Families of which only these configurations run natively: every field that is set is known.
Others run through transformers.
"""


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelUnsupported naming a field that a family in `PARTLY` must not have, or lacks."""
    fields = PARTLY.get(config["model_type"])
    if fields is None:
        return
    for name in sorted(config.keys() - {*_COMMON.split(), *fields.known.split()}):
        if config[name]:  # null, false and 0 are taken for a feature that is off
            raise ModelUnsupported(f"{where}: {name!r} is not known", field="model")
    if config.get("rope_parameters") and config.get("rope_scaling"):
        raise ModelUnsupported(f"{where}: rope_parameters and rope_scaling", field="model")
    for name in sorted({*fields.needed.split()} - config.keys()):
        raise ModelUnsupported(f"{where}: no {name!r}", field="model")


def is_elsewhere(config: Mapping[str, Any]) -> bool:
    """True if a family outside `PARTLY` sets what our decoder lacks and transformers' code has:
    another activation, a partial rotation, or `longrope`.
    """
    given = config.get(_rope_field(config))
    rope = given if isinstance(given, Mapping) else {}
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    activation = config.get("hidden_act", _SILU)
    return (
        partial != 1.0
        or (rope.get("rope_type") or rope.get("type")) == "longrope"
        or (isinstance(activation, str) and activation != _SILU)
    )


def read_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a `ModelShape` in which the family differs from Llama."""
    match config["model_type"]:
        case "granite":
            return {
                "embed_scale": number(config, "embedding_multiplier", where, 1.0),
                "residual_scale": number(config, "residual_multiplier", where, 1.0),
                "softmax_scale": number(config, "attention_multiplier", where, 1.0),
                "logits_divisor": number(config, "logits_scaling", where, 1.0),
            }
        case "phi3":
            return {"fused_projections": True}
        case "gemma2":
            return _gemma(config, where) | {
                "softcap": _cap(config, "attn_logit_softcapping", where)
            }
        case "gemma3_text":
            if config.get("attn_logit_softcapping") is not None:  # transformers ignores it
                raise ModelUnsupported(f"{where}: attn_logit_softcapping", field="model")
            window_rope = _gemma3_rope(config, "sliding_attention", where)
            return _gemma(config, where) | {"window_rope": window_rope}
        case "mixtral":
            return {"mixture": _mixture(config, where, normalized=True, rounded=False)}
        case "qwen3_moe":
            if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
                raise ModelUnsupported(f"{where}: layers without experts", field="model")
            normalized = bool(config.get("norm_topk_prob"))
            return {"mixture": _mixture(config, where, normalized=normalized, rounded=True)}
    return {}


def _mixture(config: Mapping[str, Any], where: str, *, normalized: bool, rounded: bool) -> Mixture:
    if config.get("quantization_config"):
        raise ModelUnsupported(f"{where}: quantized experts", field="model")
    # transformers 5 writes `num_local_experts` for Qwen3-MoE; earlier ones write `num_experts`.
    names = [name for name in ("num_local_experts", "num_experts") if name in config]
    if len(names) != 1:
        raise ModelUnsupported(f"{where}: one number of experts is needed", field="model")
    experts = integer(config, names[0], where)
    active = integer(config, "num_experts_per_tok", where)
    if active > experts:
        raise wrong(where, "num_experts_per_tok", active, f"at most {experts}")
    for name in ("hidden_size", inner_name(config)):
        if integer(config, name, where) % EXPERT_ALIGNMENT:
            raise wrong(where, name, config[name], f"a multiple of {EXPERT_ALIGNMENT}")
    return Mixture(experts, active, normalized, rounded)


def inner_name(config: Mapping[str, Any]) -> str:
    """The field that says the inner dimension of an MLP, or of each expert."""
    qwen3_moe = config["model_type"] == "qwen3_moe"
    return "moe_intermediate_size" if qwen3_moe else "intermediate_size"


def _gemma(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "embed_scale": integer(config, "hidden_size", where) ** 0.5,
        "embed_scale_rounded": True,
        "softmax_scale": number(config, "query_pre_attn_scalar", where) ** -0.5,
        "final_softcap": _cap(config, "final_logit_softcapping", where),
        "post_norms": True,
        "norm_offset": 1.0,
    }


def _cap(config: Mapping[str, Any], name: str, where: str) -> float | None:
    return None if config.get(name) is None else number(config, name, where)


def read_activation(config: Mapping[str, Any], where: str) -> str:
    """As in `ModelShape`."""
    name, supported, meant = "hidden_act", _SILU, _SILU
    if config["model_type"] in GEMMAS:
        name, supported, meant = "hidden_activation", "gelu_pytorch_tanh", "gelu_tanh"
    given = config.get(name, supported)
    if given != supported:
        raise ModelUnsupported(
            f"{where}: {name} {given!r} is not supported (only {supported})", field="model"
        )
    return meant


def read_windows(config: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """Follows transformers' configuration classes."""
    layers = integer(config, "num_hidden_layers", where)
    if config["model_type"] in ("llama", "granite"):
        return (None,) * layers
    if config["model_type"] in ("phi3", "mixtral"):
        given = config.get("sliding_window")
        return (given if given is None else integer(config, "sliding_window", where),) * layers
    if config["model_type"] in GEMMAS:
        # Every so many layers one attends to all tokens.
        pattern = 2
        if config["model_type"] == "gemma3_text":
            pattern = integer(config, "sliding_window_pattern", where, 6)
        alternating = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(layers)
        ]
        kinds = config.get("layer_types") or alternating
        return _by_kind(kinds, layers, integer(config, "sliding_window", where), where)
    mistral = config["model_type"] == "mistral"
    window: int | None = None
    used = mistral or config.get("use_sliding_window")
    if used and config.get("sliding_window", 4096) is not None:  # null: no window
        window = integer(config, "sliding_window", where, 4096)
    # transformers takes a Mistral with `layer_types` for a Ministral.
    if (mistral and not config.get("layer_types")) or config["model_type"] == "qwen3_moe":
        return (window,) * layers
    first = config.get("max_window_layers", 28)
    if window is not None and not is_integer(first):
        raise wrong(where, "max_window_layers", first, "an integer")
    kinds = config.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(layers)
    ]
    return _by_kind(kinds, layers, window, where)


def _by_kind(kinds: object, layers: int, window: int | None, where: str) -> tuple[int | None, ...]:
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        raise ModelUnsupported(f"{where}: layer_types {kinds} are not supported", field="model")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if config["model_type"] == "gemma3_text":
        return _gemma3_rope(config, "full_attention", where)
    name = _rope_field(config)
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise wrong(where, name, given, "a mapping")
    if (original := config.get(_ORIGINAL_CONTEXT)) is not None:
        given = {**given, _ORIGINAL_CONTEXT: original}  # computed with, whatever is inside
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelUnsupported(
            f"{where}: partial_rotary_factor {partial} is not supported", field="model"
        )
    # Phi-3 says `yarn` for `longrope`.
    supported = ("default",) if config["model_type"] == "phi3" else ROPE_TYPES
    theta = config.get("rope_theta", 1e6 if config["model_type"] == "mixtral" else 1e4)
    return _rope(given, theta, supported, where, f"{where}: {name}")


def _rope_field(config: Mapping[str, Any]) -> str:
    """transformers 5 writes `rope_parameters`; earlier ones write `rope_scaling` and `rope_theta`.
    Of both, it reads `rope_scaling`.
    """
    return "rope_scaling" if config.get("rope_scaling") else "rope_parameters"


def stretched_context(rope: Mapping[str, Any]) -> int:
    """Positions that `yarn` stretches to, which `max_position_embeddings` need not say; 0: it says
    so alone.
    """
    if rope["rope_type"] != "yarn" or not rope.get(_ORIGINAL_CONTEXT):
        return 0
    return int(rope[_ORIGINAL_CONTEXT] * rope["factor"])


def _gemma3_rope(config: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Of the layers of a kind. Earlier versions only scale those that attend to all tokens."""
    ropes = config.get("rope_parameters") or {"full_attention": config.get("rope_scaling")}
    if not isinstance(ropes, Mapping) or ropes.keys() - _GEMMA3_THETAS.keys():
        raise wrong(where, "rope_parameters", ropes, "a mapping of kinds of layers")
    given, (name, default) = ropes.get(kind) or {}, _GEMMA3_THETAS[kind]
    inside = f"{where}: rope_parameters of {kind}"
    if not isinstance(given, Mapping) or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported(f"{inside} {given!r} are not supported", field="model")
    return _rope(given, config.get(name, default), ROPE_TYPES, where, inside)


def _rope(
    given: Mapping[str, Any], theta: Any, supported: Sequence[str], where: str, inside: str
) -> dict[str, Any]:
    """theta: where `given` has none. inside: where `given` is."""
    rope = dict(given)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    rope.setdefault("rope_theta", theta)
    if rope["rope_type"] not in supported:
        raise ModelUnsupported(
            f"{where}: rope type {rope['rope_type']!r} is not supported "
            f"(supported: {', '.join(supported)})",
            field="model",
        )
    number(rope, "rope_theta", inside if "rope_theta" in given else where)
    if rope["rope_type"] != "default":
        needed = ROPE_NUMBERS[rope["rope_type"]]
        for each in (*needed, *filter(rope.get, ROPE_OPTIONAL)):
            number(rope, each, inside)
    return rope
