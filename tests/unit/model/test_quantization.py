"""A quantized checkpoint gives the logits of the fp32 weights that its tensors stand for."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import ModelUnsupported
from replica.model.dequantization import StoredModule
from replica.model.quantization import Layout, Quantization
from replica.model.shape import read_shape
from replica.model.weights import Weights, load_weights
from tests.models import edit_config, make_adapter, make_model
from tests.packed import DECODED, load, prompts, reference, run
from tests.quantized import SCHEMES, Scheme, change_tensors, compressed, fp8, words, write_quantized
from tests.small_files import write_model_config

# As in `test_decoder.py`: what is left is the order of sums.
TOLERANCE = 1e-4
TENSORS = "model.safetensors"


def written(tmp_path: Path, scheme: Scheme, *left: str) -> tuple[str, str]:
    """A quantized checkpoint, and the one that it stands for."""
    plain = make_model(tmp_path / "plain", scheme.architecture, **scheme.settings)
    return write_quantized(plain, tmp_path / "quantized", scheme, left), plain


def weights(model_dir: str, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(model_dir, read_shape(model_dir), dtype, torch.device("cpu"))


def assert_equal(found: Weights, expected: Weights) -> None:
    for own, theirs in zip(found.layers, expected.layers, strict=True):
        for one, other in zip(own.matmuls, theirs.matmuls, strict=True):
            assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_weight_is_exactly_what_its_tensors_stand_for(name: str, tmp_path: Path) -> None:
    quantized, plain = written(tmp_path, SCHEMES[name])
    assert_equal(weights(quantized), weights(plain))
    # One rounding, as of a checkpoint in float32.
    assert_equal(weights(quantized, torch.bfloat16), weights(plain, torch.bfloat16))


@pytest.mark.parametrize("name", SCHEMES)
def test_logprobs_are_those_of_the_fp32_checkpoint_with_adapters_on_top(
    name: str, tmp_path: Path
) -> None:
    quantized, plain = written(tmp_path, SCHEMES[name])
    adapter = make_adapter(tmp_path / "adapter", plain)
    texts, slots = prompts(40, 29), [1, 0]
    expected = [reference(plain, path, t) for path, t in zip((adapter, None), texts, strict=True)]
    found, _ = run(load(quantized, read_shape(quantized), [adapter]), texts, slots, 7)
    for own, theirs in zip(found, expected, strict=True):
        assert (own - theirs[-DECODED - 1 :]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["awq", "gptq", "packed", "int8", "fp8 blocks"])
def test_modules_that_a_checkpoint_leaves_as_they_were(name: str, tmp_path: Path) -> None:
    quantized, plain = written(tmp_path, SCHEMES[name], "layers.1.", "down_proj")
    stored = load_file(Path(quantized) / TENSORS)
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == torch.float32
    assert_equal(weights(quantized), weights(plain))


def test_a_weight_of_more_rows_than_are_computed_at_once() -> None:
    weight = torch.randn(1100, 64, generator=torch.Generator().manual_seed(0))
    stored, meant = fp8((48, 40))(weight.numpy())
    module = StoredModule("m", Quantization("fp8", Layout.FP8, 8, (48, 40)), stored.get)
    assert torch.equal(module.weight((1100, 64), torch.float32), torch.from_numpy(meant))


def test_a_zero_point_of_0_in_gptqs_first_version() -> None:
    """Less 1, it borrows from its neighbour in the packed word."""
    zeros = torch.tensor([[0, 5, 0, 0, 15, 1, 2, 0]])
    stored = {
        "qweight": words(torch.full((8, 8), 3).numpy(), 4).T.contiguous(),
        "qzeros": words(zeros.numpy(), 4) - 0x11111111,
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    scheme = Quantization("gptq", Layout.GPTQ, 4, (1, None), True, zeros_less_one=True)
    found = StoredModule("m", scheme, stored.get).weight((8, 8), torch.float32)
    assert torch.equal(found, (3.0 - zeros.T).expand(8, 8))


def test_a_bias_of_zeros_that_autogptq_adds_is_left_out(tmp_path: Path) -> None:
    quantized, plain = written(tmp_path, SCHEMES["gptq"])
    change_tensors(quantized, **{"model.layers.0.self_attn.k_proj.bias": torch.zeros(32)})
    assert_equal(weights(quantized), weights(plain))
    change_tensors(quantized, **{"model.layers.0.self_attn.k_proj.bias": torch.ones(32)})
    with pytest.raises(ModelUnsupported, match=r"k_proj\.bias' is not part of the architecture"):
        weights(quantized)


PROJECTION = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "kind", "tensor", "message"),
    [
        ("gptq", "scales", None, "no tensor 'scales'"),
        ("gptq", "qzeros", torch.zeros(2, 11, dtype=torch.int32), "zero points have shape (88, 2)"),
        ("gptq", "qweight", torch.zeros(8, 96, dtype=torch.int64), "qweight is torch.int64"),
        ("gptq", "scales", torch.ones(1, 96), "scales have shape (96, 1), config.json says (96, 2"),
        ("gptq", "g_idx", torch.full((64,), 2), "a column's group is not one of 2"),
        ("gptq", "g_idx", torch.full((64,), -1), "a column's group is not one of 2"),
        ("gptq, act-order", "g_idx", None, "no tensor 'g_idx'"),
        # 8 bits where config.json says 4.
        ("awq", "qweight", torch.zeros(64, 24, dtype=torch.int32), "codes have shape (192, 64)"),
        ("packed", "weight_packed", torch.zeros(96, 16, dtype=torch.int32), "has 128 columns"),
        ("packed", "weight_shape", torch.tensor([96, 63]), "weight_shape is [96, 63]"),
        ("packed, asymmetric", "weight_zero_point", None, "no tensor 'weight_zero_point'"),
        ("packed", "weight_packed", torch.tensor(1, dtype=torch.int32), "not that of a matrix"),
        ("packed", "weight_shape", torch.tensor(96), "weight_shape is 96, config.json"),
        ("awq", "qzeros", torch.zeros(0, 24, dtype=torch.int32), "not that of a matrix"),
        ("int8", "weight_scale", torch.full((96, 1), torch.nan), "not all of its values are fin"),
        ("packed, act-order", "weight_g_idx", None, "no tensor 'weight_g_idx'"),
        ("packed", "weight_zero_point", torch.zeros(1), "weight_zero_point' is not part of"),
        ("int8", "weight_scale", None, "no tensor 'weight_scale'"),
        ("int8", "weight", torch.ones(96, 64, dtype=torch.uint8), "weight is torch.uint8"),
        # A scale beside a weight that is not quantized.
        ("int8", "weight", torch.ones(96, 64), "_scale' is not part of the architecture"),
        ("fp8 blocks", "weight_scale_inv", torch.ones(1, 2), "scales have shape (1, 2)"),
        (
            "fp8 blocks",
            "weight_scale_inv",
            torch.ones(2, 2, dtype=torch.uint8),
            "weight_scale_inv is torch.uint8",
        ),
        (
            "fp8 of vLLM",
            "weight",
            torch.ones(96, 64).to(torch.float8_e5m2),
            "weight is torch.float8_e5m2",
        ),
    ],
)
def test_tensors_that_contradict_the_configuration(
    name: str, kind: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    quantized, _ = written(tmp_path, SCHEMES[name])
    change_tensors(quantized, **{f"{PROJECTION}.{kind}": tensor})
    with pytest.raises(ModelUnsupported, match=re.escape(message)) as caught:
        weights(quantized)
    assert PROJECTION in caught.value.message


@pytest.mark.parametrize("name", ["int8", "fp8 channels"])
def test_quantized_tensors_without_a_configuration(name: str, tmp_path: Path) -> None:
    quantized, _ = written(tmp_path, SCHEMES[name])
    edit_config(quantized, quantization_config=None)
    with pytest.raises(ModelUnsupported, match=r"config\.json does not say how it is"):
        weights(quantized)


AWQ, GPTQ = {"quant_method": "awq"}, {"quant_method": "gptq", "bits": 4}
FP8 = {"quant_method": "fp8"}
PACKED = partial(compressed, "pack-quantized", num_bits=4, strategy="group", group_size=32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization 'bitsandbytes'"),
        ({"quant_method": "gguf"}, "quantization 'gguf' is not supported (supported: awq, comp"),
        ({}, "quantization 'unknown'"),
        (AWQ | {"bits": 8}, "bits 8"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"version": None, "format": "marlin"}, "version 'marlin'"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (AWQ | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (AWQ | {"group_size": "128"}, "group_size '128' is neither"),
        (AWQ | {"group_size": 0}, "group_size 0 is neither"),
        ({"quant_method": "gptq"}, "bits None is not supported (supported: 4, 8)"),
        (GPTQ | {"bits": 3}, "bits 3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format True"),
        (GPTQ | {"dynamic": {r"+:.*\.up_proj": {"bits": 8}}}, "dynamic '+:"),
        (GPTQ | {"adapter": {"path": "eora"}}, "adapter is not supported"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (GPTQ | {"dynamic": 5}, "dynamic 5"),
        (GPTQ | {"dynamic": [None]}, "dynamic [None]"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size [128] are not two"),
        (FP8 | {"weight_block_size": [10**30, 128]}, "are not two positive integers"),
        (FP8 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed("dense"), "format 'dense'"),
        (compressed("mixed-precision"), "format 'mixed-precision'"),
        (compressed("marlin-24"), "format 'marlin-24'"),
        (PACKED(num_bits=2), "num_bits 2"),
        (PACKED(type="float"), "type 'float'"),
        (PACKED(strategy="tensor_group"), "strategy 'tensor_group'"),
        (PACKED(group_size=None), "group_size None is neither"),
        (PACKED(actorder="later"), "actorder 'later'"),
        (PACKED(dynamic=True), "dynamic True"),
        (compressed("float-quantized", type="float", num_bits=4), "num_bits 4"),
        (
            compressed("float-quantized", type="float", strategy="block"),
            "block_structure None are not two",
        ),
        (PACKED() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        (PACKED() | {"transform_config": {"R1": {}}}, "transform_config is not supported"),
        (
            PACKED() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config: format 'sparse-24-bitmask'",
        ),
        (PACKED() | {"config_groups": {}}, "none: only one way to quantize"),
        (PACKED() | {"config_groups": {"W4A16": ["Linear"]}}, "W4A16 ['Linear'] is not a mapping"),
        (
            PACKED() | {"config_groups": {"kv": {"targets": ["LlamaAttention"]}}},
            "weights None is not a mapping",
        ),
        (
            PACKED()
            | {
                "config_groups": {
                    "attention": PACKED(num_bits=8)["config_groups"]["group_0"],
                    "mlp": PACKED()["config_groups"]["group_0"],
                }
            },
            "attention, mlp: only one way to quantize weights is supported",
        ),
    ],
)
def test_schemes_that_are_not_read(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    model_dir = write_model_config(tmp_path)
    edit_config(model_dir, quantization_config=config)
    with pytest.raises(ModelUnsupported, match=re.escape(message)) as caught:
        read_shape(model_dir)
    assert caught.value.field == "model"
    assert str(tmp_path / "config.json") in caught.value.message
