"""A layer's experts compute what transformers' block does, wherever the router sends tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.errors import AdapterRefused, ConfigError, ModelUnsupported
from lora_kernels.ops import silu_mul
from replica.adapters.adapter_files import read_adapter
from replica.engine.sizing import step_bytes, weight_bytes
from replica.model.checkpoint import shape_of
from replica.model.experts import Experts, load_experts
from replica.model.module_walk import walk
from replica.model.shape import ModelShape, Shard, read_shape
from replica.model.stored_checkpoint import StoredCheckpoint
from tests.models import edit_config, edit_tensors, make_adapter, make_model
from tests.packed import DECODED, load, prompts, reference, run
from tests.small_files import settled_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXTRAL: dict[str, Any] = {"num_local_experts": 4}
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", MIXTRAL),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe, normalized": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True}),
}


def made(tmp_path: Path, name: str, **settings: Any) -> str:
    architecture, own = MODELS[name]
    return make_model(tmp_path / "model", architecture, **own | settings)


def experts_of(model_dir: str, dtype: torch.dtype, shard: Shard | None = None) -> Experts:
    path, cpu = Path(model_dir), torch.device("cpu")
    with StoredCheckpoint(path, dtype, cpu, None) as checkpoint:
        return load_experts(checkpoint, read_shape(model_dir), "model.layers.1", shard or Shard())


def block_of(model_dir: str, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    return model.model.layers[1].mlp


def drawn(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_layer_is_transformers_block(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model_dir = made(tmp_path, name)
    experts, block = experts_of(model_dir, dtype), block_of(model_dir, dtype)
    for tokens in (1, 5, 64):
        x = drawn(tokens, dtype)
        found, wanted = experts(x, silu_mul), block(x[None])[0]
        assert found.dtype == dtype
        assert torch.equal(found, wanted)  # the same operations, rounded in the same places


@pytest.mark.parametrize("active", [1, 2])
@torch.inference_mode()
def test_one_expert_gets_every_token_and_others_none(active: int, tmp_path: Path) -> None:
    model_dir = made(tmp_path, "mixtral", num_experts_per_tok=active)
    experts, block = experts_of(model_dir, torch.float32), block_of(model_dir, torch.float32)
    x = drawn(7, torch.float32) + 1
    for first in range(4):
        rows = torch.zeros(4, 64)
        rows[first] = 1.0
        experts.router.copy_(rows)
        block.gate.weight.copy_(rows)
        assert (block.gate(x)[2][:, 0] == first).all()
        torch.testing.assert_close(experts(x, silu_mul), block(x[None])[0])


@torch.inference_mode()
def test_experts_that_no_token_chose_may_hold_anything(tmp_path: Path) -> None:
    experts = experts_of(made(tmp_path, "mixtral"), torch.float32)
    experts.router.copy_(torch.eye(4, 64))
    x = torch.zeros(5, 64)
    x[:, 0], x[:, 2] = 9.0, 8.0
    before = experts(x, silu_mul)
    assert before.abs().max() > 0
    for each in (1, 3):
        experts.gate_up[each] = experts.down[each] = float("nan")
    assert torch.equal(experts(x, silu_mul), before)


@torch.inference_mode()
def test_a_row_that_is_not_finite_spoils_no_other(tmp_path: Path) -> None:
    experts, x = experts_of(made(tmp_path, "qwen3_moe"), torch.float32), drawn(6, torch.float32)
    before = experts(x, silu_mul)
    x[2] = float("nan")
    found = experts(x, silu_mul)
    others = [0, 1, 3, 4, 5]
    assert found[2].isnan().all()
    torch.testing.assert_close(found[others], before[others])


def test_the_host_reads_nothing_of_what_the_router_chose(tmp_path: Path) -> None:
    """Tensors of the meta device have no content, so reading it raises."""
    real = experts_of(made(tmp_path, "mixtral"), torch.bfloat16)
    names = ("router", "gate_up", "down", "numbers")
    experts = replace(real, **{name: getattr(real, name).to("meta") for name in names})
    x = torch.empty(5, 64, dtype=torch.bfloat16, device="meta")
    assert experts(x, silu_mul).shape == x.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.nonzero()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_parts_of_ranks_add_up(name: str, tmp_path: Path) -> None:
    model_dir = made(tmp_path, name)
    x = drawn(9, torch.float32)
    whole = experts_of(model_dir, torch.float32)
    parts = [experts_of(model_dir, torch.float32, Shard(rank, 2)) for rank in range(2)]
    for part in parts:
        assert part.down.numel() * 2 == whole.down.numel()
    found = sum(part(x, silu_mul) for part in parts)
    torch.testing.assert_close(found, whole(x, silu_mul))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_fused_experts_is_the_same(name: str, ranks: int, tmp_path: Path) -> None:
    model_dir = made(tmp_path, name)
    fused = tmp_path / "fused"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.save_pretrained(fused, save_original_format=False)
    assert any(key.endswith("experts.down_proj") for key in load_file(fused / "model.safetensors"))
    for rank in range(ranks):
        own, theirs = (
            experts_of(str(each), torch.float32, Shard(rank, ranks)) for each in (model_dir, fused)
        )
        for part in ("router", "gate_up", "down"):
            assert torch.equal(getattr(own, part), getattr(theirs, part))
    (text,) = prompts(20)
    (found,), _ = run(load(str(fused), read_shape(str(fused))), [text], [0], 7)
    assert (found - reference(model_dir, None, text)[-DECODED - 1 :]).abs().max() <= 1e-4


def test_qwen3s_own_name_for_the_number_of_experts(tmp_path: Path) -> None:
    """transformers 5 writes another."""
    model_dir = made(tmp_path, "qwen3_moe")
    shape = read_shape(model_dir)
    edit_config(model_dir, num_local_experts=None, num_experts=8)
    assert read_shape(model_dir) == shape
    assert shape.mixture is not None and shape.mixture.experts == 8


def test_mixtrals_own_rope_theta_where_none_is_given(tmp_path: Path) -> None:
    model_dir = made(tmp_path, "mixtral")
    edit_config(model_dir, rope_parameters=None)
    (text,) = prompts(30)
    (found,), _ = run(load(model_dir, read_shape(model_dir)), [text], [0], 7)
    assert (found - reference(model_dir, None, text)[-DECODED - 1 :]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("layers.1.block_sparse_moe.experts.3.w2.weight", None, "no tensor .*experts.3.w2.weight'"),
        (
            "layers.1.block_sparse_moe.gate.weight",
            torch.ones(5, 64),
            "config.json says \\(4, 64\\)",
        ),
        ("layers.1.block_sparse_moe.experts.0.w1.weight", torch.ones(64, 96), "shape \\(64, 96\\)"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(
    suffix: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    model_dir = made(tmp_path, "mixtral")
    edit_tensors(model_dir, "model.safetensors", **{suffix: tensor})
    with pytest.raises(ModelUnsupported, match=message):
        load(model_dir, read_shape(model_dir))


def test_more_experts_than_config_json_says_are_refused(tmp_path: Path) -> None:
    model_dir = made(tmp_path, "mixtral")
    path = tmp_path / "model" / "model.safetensors"
    more = "model.layers.0.block_sparse_moe.experts.4.w1.weight"
    save_file(load_file(path) | {more: torch.ones(96, 64)}, path)
    with pytest.raises(ModelUnsupported, match=r"experts\.4\.w1.*not part of the architecture"):
        load(model_dir, read_shape(model_dir))


@pytest.mark.parametrize(
    "module", ["block_sparse_moe.gate", "block_sparse_moe.experts.0.w1", "mlp.experts"]
)
def test_an_adapter_of_router_or_experts_is_refused_as_through_transformers(
    module: str, tmp_path: Path
) -> None:
    model_dir = made(tmp_path, "mixtral")
    adapter = make_adapter(tmp_path / "adapter", model_dir, targets=ATTENTION)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = f"base_model.model.model.layers.0.{module}.lora_A.weight"
    save_file(load_file(path) | {name: torch.ones(8, 64)}, path)
    messages = []
    for shape in (read_shape(model_dir), walk(model_dir)):
        with pytest.raises(AdapterRefused, match=f"tensor '.*{module}.*is not supported") as caught:
            read_adapter(adapter, shape)
        messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_an_adapter_of_parameters_is_refused_by_name(tmp_path: Path) -> None:
    model_dir = made(tmp_path, "mixtral")
    parameters = ["mlp.experts.gate_up_proj"]
    adapter = make_adapter(
        tmp_path / "adapter", model_dir, targets=("q_proj",), target_parameters=parameters
    )
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_parameters"] == parameters
    with pytest.raises(AdapterRefused, match="target_parameters"):
        read_adapter(adapter, read_shape(model_dir))


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (
            {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336}
            | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
            | {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
            | {"max_position_embeddings": 32768, "vocab_size": 32000, "rms_norm_eps": 1e-5}
            | {"router_aux_loss_coef": 0.02, "output_router_logits": False},
            46_702_526_464,
        ),
        (
            {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144}
            | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
            | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
            | {"max_position_embeddings": 40960, "vocab_size": 151936, "rms_norm_eps": 1e-6}
            | {"head_dim": 128, "norm_topk_prob": True, "rope_theta": 1e6, "max_window_layers": 48}
            | {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False}
            | {"router_aux_loss_coef": 0.001, "sliding_window": None, "attention_bias": False},
            30_531_911_680,
        ),
    ],
    ids=["Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_published_models_run_natively(
    fields: dict[str, Any], parameters: int, tmp_path: Path
) -> None:
    """Without norms, 46.7 and 30.5 billion parameters."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape = shape_of(str(tmp_path))
    assert isinstance(shape, ModelShape)
    assert shape.parameters == parameters
    assert shape.windows == (None,) * shape.layers
    assert shape.divided(4).intermediate * 4 == shape.intermediate


@pytest.mark.parametrize("name", MODELS)
def test_sizes_count_every_expert_and_a_step_those_that_compute(name: str, tmp_path: Path) -> None:
    model_dir = made(tmp_path, name)
    shape = shape_of(model_dir)
    assert isinstance(shape, ModelShape) and shape.mixture is not None
    config = settled_config(model_dir)
    tensors = load_file(tmp_path / "model" / "model.safetensors").values()
    norms = sum(each.numel() for each in tensors if each.dim() == 1)
    whole = weight_bytes(config, shape)
    assert whole == 4 * (sum(each.numel() for each in tensors) - norms)
    half = weight_bytes(config, shape.divided(2))
    outside = 4 * (2 * shape.vocab + shape.layers * shape.mixture.experts) * shape.hidden
    assert half - outside == (whole - outside) / 2
    more = replace(shape.mixture, experts=2 * shape.mixture.experts)
    assert step_bytes(config, replace(shape, mixture=more)) == step_bytes(config, shape)
    fewer = replace(shape.mixture, active=shape.mixture.active - 1)
    assert step_bytes(config, replace(shape, mixture=fewer)) < step_bytes(config, shape)


def test_ranks_with_slices_that_grouped_matmuls_do_not_take(tmp_path: Path) -> None:
    shape = read_shape(made(tmp_path, "mixtral", intermediate_size=40, num_key_value_heads=4))
    with pytest.raises(ConfigError, match="2 ranks would have 20 of each expert's 40 columns"):
        shape.divided(2)
