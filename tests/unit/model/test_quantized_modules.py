"""A quantized checkpoint that runs through transformers' modules gives the log-probabilities of
transformers and PEFT on the weights that its tensors stand for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import ModelUnsupported
from replica.engine.sizing import described, weight_bytes
from replica.model.module_walk import walk
from replica.model.shape import read_shape
from tests.models import edit_config, make_adapter, make_model
from tests.packed import DECODED, VOCAB, load, prompts, reference, run
from tests.quantized import SCHEMES, change_tensors, write_quantized

TOLERANCE = 1e-5
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXTRAL: dict[str, Any] = {"num_local_experts": 4}
QWEN3_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LAYOUTS = ("awq", "gptq, act-order", "packed, asymmetric", "int8", "fp8 blocks")
FAMILIES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("mixtral", MIXTRAL, LAYOUTS),
    ("qwen3_moe", QWEN3_MOE, ("gptq", "packed, act-order", "fp8 blocks")),
    ("olmo2", {}, LAYOUTS),
    ("glm4", {}, ("packed", "int8, whole tensor")),  # one module for gate and up, and biases
)
PROJECTION = "model.layers.1.mlp.up_proj"


def written(
    tmp_path: Path, scheme: str, architecture: str = "olmo2", *left: str, **settings: Any
) -> tuple[str, str]:
    """A quantized checkpoint, and the one that it stands for."""
    plain = make_model(tmp_path / "plain", architecture, **settings)
    return write_quantized(plain, tmp_path / "quantized", SCHEMES[scheme], left), plain


@pytest.mark.parametrize(
    ("architecture", "settings", "scheme"),
    [(name, settings, each) for name, settings, layouts in FAMILIES for each in layouts],
)
def test_logprobs_are_those_of_the_fp32_checkpoint_with_adapters_on_top(
    architecture: str, settings: dict[str, Any], scheme: str, tmp_path: Path
) -> None:
    # Some modules stay as they are.
    quantized, plain = written(tmp_path, scheme, architecture, "layers.2.self", **settings)
    adapter = make_adapter(tmp_path / "adapter", plain, targets=ATTENTION)
    texts = prompts(40, 29)
    expected = [reference(plain, path, t) for path, t in zip((adapter, None), texts, strict=True)]
    found, _ = run(load(quantized, walk(quantized), [adapter]), texts, [1, 0], 7)
    for own, theirs in zip(found, expected, strict=True):
        assert (own - theirs[-DECODED - 1 :]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantized_model_of_images_answers_text(nested: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    text = {"vocab_size": VOCAB, "intermediate_size": 96, "num_key_value_heads": 2}
    images = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
    settings = {
        "text_config": sizes | text | {"sliding_window": 8, "max_position_embeddings": 512},
        "vision_config": images | {"patch_size": 14, "num_attention_heads": 2},
        "image_token_index": 1,
    }
    quantized, plain = written(tmp_path, "int8", "gemma3", "vision", "multi_modal", **settings)
    if nested:
        config = json.loads((Path(quantized) / "config.json").read_text())
        text_config = config["text_config"] | {"quantization_config": config["quantization_config"]}
        edit_config(quantized, text_config=text_config, quantization_config=None)
    (prompt,) = prompts(30)
    (found,), _ = run(load(quantized, walk(quantized)), [prompt], [0], 7)
    difference = found - reference(plain, None, prompt)[-DECODED - 1 :]
    assert difference.abs().max() <= TOLERANCE


def test_every_weight_is_exactly_what_its_tensors_stand_for(tmp_path: Path) -> None:
    quantized, plain = written(tmp_path, "awq", "mixtral", **MIXTRAL)
    found, expected = (load(each, walk(each), dtype="bfloat16") for each in (quantized, plain))
    theirs = dict(expected.model.modules.named_parameters())
    for name, own in found.model.modules.named_parameters():
        assert own.dtype == torch.bfloat16
        assert torch.equal(own, theirs[name]), name


def test_sizes_are_those_of_the_dequantized_weights(tmp_path: Path) -> None:
    quantized, plain = written(tmp_path, "gptq", "mixtral", **MIXTRAL)
    config = EngineConfig(model=quantized, dtype="float32", device="cpu")
    shape = walk(quantized)
    held = sum(each.numel() * 4 for each in load(plain, walk(plain)).model.modules.parameters())
    assert weight_bytes(config, shape) == held
    assert "weights: dequantized from gptq (4 bits)" in described(config, config, shape)[1]


def test_that_transformers_runs_the_model_is_told(tmp_path: Path) -> None:
    _, plain = written(tmp_path, "gptq", "mixtral", **MIXTRAL)
    config = EngineConfig(model=plain, dtype="float32", device="cpu")
    own = [line for line in described(config, config, read_shape(plain)) if "decoder" in line]
    theirs = [line for line in described(config, config, walk(plain)) if "decoder" in line]
    assert own == [] and "transformers" in theirs[0]


@pytest.mark.parametrize(
    ("scheme", "tensors", "message"),
    [
        ("gptq", {"scales": None}, f"{PROJECTION}: no tensor 'scales'"),
        ("int8", {"weight_scale": None}, f"{PROJECTION}: no tensor 'weight_scale'"),
        ("awq", {"qweight": None}, f"missing tensor {PROJECTION}.weight"),
        ("awq", {"qweight": torch.zeros(64, 24, dtype=torch.int32)}, "scales have shape"),
        ("packed", {"weight_shape": torch.tensor([96, 56])}, f"{PROJECTION}: weight_packed has 64"),
        ("packed", {"weight_shape": torch.tensor(96)}, "weight_shape is 96, not that of a matrix"),
        ("packed", {"weight_zero_point": torch.zeros(1)}, "weight_zero_point' is not part of"),
        ("packed", {"weight": torch.zeros(96, 64)}, "up_proj.weight' is not part of the arch"),
        ("packed", {"other": torch.zeros(1)}, "up_proj.other' is not part of the architecture"),
        ("packed", {"bias": torch.zeros(96)}, f"unexpected tensor {PROJECTION}.bias"),
        ("gptq", {"bias": torch.ones(96)}, f"unexpected tensor {PROJECTION}.bias"),
        # A scale beside a weight that is not quantized.
        ("int8", {"weight": torch.ones(96, 64)}, f"unexpected tensor {PROJECTION}.input_scale"),
        ("int8", {"weight": torch.zeros(2, 96, 64, dtype=torch.int8)}, "not that of a matrix"),
        ("packed", {"weight_packed": None, "weight_shape": None}, "missing tensor"),
        ("fp8 channels", {"weight": torch.zeros(48, 64).to(torch.float8_e4m3fn)}, "scales have"),
    ],
)
def test_tensors_that_contradict_the_configuration(
    scheme: str, tensors: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    quantized, _ = written(tmp_path, scheme)
    change_tensors(quantized, **{f"{PROJECTION}.{kind}": each for kind, each in tensors.items()})
    with pytest.raises(ModelUnsupported) as caught:
        load(quantized, walk(quantized))
    assert message in caught.value.message
    assert caught.value.message.count(quantized) == 1


def test_a_bias_of_zeros_that_autogptq_adds_is_left_out(tmp_path: Path) -> None:
    quantized, _ = written(tmp_path, "gptq", "mixtral", **MIXTRAL)
    expert = "model.layers.1.block_sparse_moe.experts.2.w1"
    change_tensors(quantized, **{f"{expert}.bias": torch.zeros(96)})
    load(quantized, walk(quantized))


def test_a_quantized_weight_of_another_size_is_refused(tmp_path: Path) -> None:
    quantized, _ = written(tmp_path, "int8")
    edit_config(quantized, intermediate_size=64)
    with pytest.raises(ModelUnsupported, match="ignore_mismatched_sizes"):
        load(quantized, walk(quantized))


def test_quantized_tensors_without_a_configuration(tmp_path: Path) -> None:
    quantized, _ = written(tmp_path, "fp8 blocks")
    edit_config(quantized, quantization_config=None)
    with pytest.raises(ModelUnsupported, match=r"unexpected tensor .*weight_scale_inv"):
        load(quantized, walk(quantized))


def test_an_8_bit_tensor_of_another_layout_is_refused(tmp_path: Path) -> None:
    quantized, _ = written(tmp_path, "packed")
    path = "model.layers.1.post_attention_layernorm.weight"
    change_tensors(quantized, **{path: torch.ones(64).to(torch.float8_e4m3fn)})
    with pytest.raises(ModelUnsupported, match=r"is F8_E4M3, and config\.json does not"):
        load(quantized, walk(quantized))


def test_quantized_conv1d_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "gpt2")
    edit_config(model_dir, quantization_config=dict(SCHEMES["gptq"].config))
    with pytest.raises(ModelUnsupported, match="quantized Conv1D"):
        walk(model_dir)
