"""How the families of our own decoder differ: what `config.json` says beyond dimensions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ModelUnsupported
from replica.model.config_fields import integer, is_integer, number, wrong

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3")
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
_NEEDED = "num_key_value_heads rms_norm_eps"


@dataclass(frozen=True, slots=True)
class _Fields:
    """Names of fields. known: beside `_COMMON`. needed: those whose defaults in transformers are
    not read here.
    """

    known: str
    needed: str = _NEEDED


PARTLY: Mapping[str, _Fields] = {"granite": _Fields(_GRANITE), "phi3": _Fields(_PHI3)}
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
    return {}


def read_activation(config: Mapping[str, Any], where: str) -> str:
    """As in `ModelShape`."""
    given = config.get("hidden_act", "silu")
    if given != "silu":
        raise ModelUnsupported(
            f"{where}: hidden_act {given!r} is not supported (only silu)", field="model"
        )
    return "silu"


def read_windows(config: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """Follows transformers' configuration classes."""
    layers = integer(config, "num_hidden_layers", where)
    if config["model_type"] in ("llama", "granite"):
        return (None,) * layers
    if config["model_type"] == "phi3":
        given = config.get("sliding_window")
        return (given if given is None else integer(config, "sliding_window", where),) * layers
    mistral = config["model_type"] == "mistral"
    window: int | None = None
    used = mistral or config.get("use_sliding_window")
    if used and config.get("sliding_window", 4096) is not None:  # null: no window
        window = integer(config, "sliding_window", where, 4096)
    if mistral:
        return (window,) * layers
    first = config.get("max_window_layers", 28)
    if window is not None and not is_integer(first):
        raise wrong(where, "max_window_layers", first, "an integer")
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


def read_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    # transformers 5 writes `rope_parameters`; earlier ones write `rope_scaling` and `rope_theta`.
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise wrong(where, name, given, "a mapping")
    rope = dict(given)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    # Phi-3 says `yarn` for `longrope`.
    supported = ("default",) if config["model_type"] == "phi3" else ROPE_TYPES
    if rope["rope_type"] not in supported:
        raise ModelUnsupported(
            f"{where}: rope type {rope['rope_type']!r} is not supported "
            f"(supported: {', '.join(supported)})",
            field="model",
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelUnsupported(
            f"{where}: partial_rotary_factor {partial} is not supported", field="model"
        )
    inside = f"{where}: {name}"
    number(rope, "rope_theta", inside if "rope_theta" in given else where)
    if rope["rope_type"] != "default":
        needed = ROPE_NUMBERS[rope["rope_type"]]
        for each in (*needed, *filter(rope.get, ROPE_OPTIONAL)):
            number(rope, each, inside)
    return rope
