"""Reading `config.json`: what is supported, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from cluster.errors import ModelUnsupported
from replica.model.shape import GROUPS, PROJECTIONS, ModelShape, read_shape

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def read(path: Path, generation: dict[str, Any] | None = None, **fields: Any) -> ModelShape:
    (path / "config.json").write_text(json.dumps(CONFIG | fields))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return read_shape(str(path))


def test_dimensions(tmp_path: Path) -> None:
    shape = read(tmp_path)
    assert (shape.architecture, shape.layers, shape.hidden) == ("llama", 3, 64)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (4, 2, 16)
    assert (shape.intermediate, shape.vocab, shape.context) == (96, 320, 512)
    assert (shape.dtype, shape.norm_eps, shape.tied_embeddings) == ("bfloat16", 1e-5, False)


def test_projections_in_order(tmp_path: Path) -> None:
    shape = read(tmp_path, head_dim=32)
    assert tuple(shape.projections) == PROJECTIONS == tuple(n for group in GROUPS for n in group)
    assert shape.projections["q_proj"] == (64, 128)
    assert shape.projections["v_proj"] == (64, 64)
    assert shape.projections["o_proj"] == (128, 64)
    assert shape.projections["down_proj"] == (96, 64)


def test_transformers_5_says_dtype(tmp_path: Path) -> None:
    assert read(tmp_path, torch_dtype=None, dtype="float16").dtype == "float16"
    assert read(tmp_path, torch_dtype=None).dtype == "float32"


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (1, None, {1}),
        ([1, 2], None, {1, 2}),
        (None, None, set()),
        (1, {"eos_token_id": [1, 7]}, {1, 7}),
        (None, {"eos_token_id": 0}, {0}),
        (1, {}, {1}),
    ],
)
def test_eos_of_both_files(
    config: Any, generation: dict[str, Any] | None, expected: set[int], tmp_path: Path
) -> None:
    assert read(tmp_path, generation, eos_token_id=config).eos_tokens == expected


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 8}, (None, None, None)),
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "mistral"}, (4096, 4096, 4096)),
        ({"model_type": "qwen2", "sliding_window": 8}, (None, None, None)),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
            | {"max_window_layers": 1},
            (None, 8, 8),
        ),
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            (8, None, 8),
        ),
        (
            {"model_type": "mistral", "sliding_window": 9}
            | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            (None, 9, None),
        ),
    ],
)
def test_sliding_windows(
    fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    assert read(tmp_path, **fields).windows == windows


@pytest.mark.parametrize(
    ("fields", "biases"),
    [
        ({"model_type": "llama"}, (False, False, False)),
        ({"model_type": "llama", "attention_bias": True}, (True, True, False)),
        ({"model_type": "llama", "mlp_bias": True}, (False, False, True)),
        ({"model_type": "qwen2"}, (True, False, False)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, False)),
    ],
)
def test_biases(fields: dict[str, Any], biases: tuple[bool, ...], tmp_path: Path) -> None:
    shape = read(tmp_path, **fields)
    assert (shape.qkv_bias, shape.output_bias, shape.mlp_bias) == biases


def test_rope_in_both_spellings(tmp_path: Path) -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    old = {"type": "linear", "factor": 2.0}
    assert read(tmp_path, rope_parameters=new).rope == new
    assert read(tmp_path, rope_scaling=old, rope_theta=5e5).rope == new
    assert read(tmp_path).rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_rope_is_read_in_transformers_order(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 5e5}
    yarn = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 5e5}
    original = "original_max_position_embeddings"
    for fields in (
        {"rope_parameters": plain, "rope_scaling": yarn | {original: 32}},
        {"rope_scaling": yarn, original: 32},
        {"rope_parameters": yarn | {original: 64}, original: 32},
    ):
        shape = read(tmp_path, **fields)
        config = AutoConfig.from_pretrained(tmp_path)
        config.standardize_rope_params()  # as it does for each table
        assert shape.rope == config.rope_parameters, fields


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"type": "yarn", "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "original_max_position_embeddings": 64}, 512),
        ({"type": "yarn"}, 512),
        ({"type": "linear", "original_max_position_embeddings": 256}, 512),
    ],
)
def test_yarn_stretches_the_context(rope: dict[str, Any], context: int, tmp_path: Path) -> None:
    """Qwen2.5's model card says to add it and nothing else."""
    shape = read(tmp_path, rope_scaling=rope | {"factor": 4.0}, max_position_embeddings=512)
    assert shape.context == context


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "None"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnsupported, match=named) as caught:
        read(tmp_path, **fields)
    assert caught.value.field == "model"


def test_a_missing_dimension_is_named(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnsupported, match="hidden_size"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": "4"}, "num_hidden_layers '4' is not a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers True is not"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not"),
        ({"num_key_value_heads": [2]}, "num_key_value_heads [2] is not"),
        ({"head_dim": 16.5}, "head_dim 16.5 is not"),
        ({"hidden_size": None}, "hidden_size None is not"),
        ({"max_position_embeddings": -5}, "max_position_embeddings -5 is not"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps 'a' is not a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan is not"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>' is not a token"),
        ({"rope_theta": "1e4"}, "config.json: rope_theta '1e4' is not a positive number"),
        ({"rope_parameters": "x"}, "rope_parameters 'x' is not a mapping"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: factor '2' is not"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "rope_scaling: no 'low_freq_factor'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "x"}},
            "rope_scaling: beta_fast 'x' is not",
        ),
        ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window '8' is not"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "8"},
            "max_window_layers '8' is not",
        ),
        ({"model_type": "qwen3", "layer_types": 3}, "layer_types 3 are not supported"),
        ({"quantization_config": "awq"}, "quantization 'awq' is not supported"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnsupported, match=re.escape(words)) as caught:
        read(tmp_path, **fields)
    assert caught.value.message.startswith(f"{tmp_path / 'config.json'}: ")


def test_a_wrong_token_of_generation_is_named_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"generation_config\.json: eos_token_id 'x'"):
        read(tmp_path, generation={"eos_token_id": "x"})


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"no config\.json"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnsupported, match=r"config\.json"):
        read_shape(str(tmp_path))
