"""Models that run through transformers' own modules give the log-probabilities of transformers
with PEFT, and those that would not are refused at the start.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.olmo2 import modeling_olmo2

from cluster.errors import ConfigError, ModelUnsupported
from replica.engine.runner import Runner
from replica.model import checkpoint, transformers_model
from replica.model.checkpoint import shape_of
from replica.model.launch import Asked, Row
from replica.model.module_walk import walk
from replica.model.shape import read_shape
from replica.scheduling.request import Sampling
from tests.models import edit_config, make_adapter, make_model
from tests.packed import DECODED, VOCAB, load, prompts, reference, run

TOLERANCE = 1e-4
GREEDY = Sampling(temperature=0.0)
Mlp = Callable[[torch.Tensor], torch.Tensor]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Rows of 17 to 50 tokens exceed these windows and lengths.
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gemma2": ("gemma2", ATTENTION + MLP, {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", ATTENTION + MLP, {"sliding_window": 8}),
    "gemma4_text, heads of two sizes": (
        "gemma4_text",
        (*ATTENTION, *MLP, "per_layer_projection"),
        {"sliding_window": 8, "global_head_dim": 32},
    ),
    "phi3": ("phi3", ("qkv_proj", "o_proj", "gate_up_proj"), {"pad_token_id": 2}),
    "phi3, window": ("phi3", ("qkv_proj",), {"pad_token_id": 2, "sliding_window": 8}),
    "granite": ("granite", ATTENTION + MLP, {"logits_scaling": 4.0, "attention_multiplier": 0.1}),
    "gpt2": ("gpt2", ("c_attn", "c_fc", "c_proj"), {}),
    "gpt_neox": ("gpt_neox", ("query_key_value", "dense", "dense_4h_to_h"), {}),
    "starcoder2": ("starcoder2", (*ATTENTION, "c_fc", "c_proj"), {"sliding_window": 8}),
    "olmo2, yarn": ("olmo2", ATTENTION + MLP, {"rope_parameters": YARN}),
    "mixtral": ("mixtral", ATTENTION, {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", ATTENTION, {"num_experts": 8, "num_experts_per_tok": 2}),
    "opt, learned positions": ("opt", ("q_proj", "v_proj", "fc1", "fc2"), {}),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_what_peft_computes(family: str, device: str, tmp_path: Path) -> None:
    architecture, targets, settings = FAMILIES[family]
    model_dir = make_model(tmp_path / "model", architecture, **settings)
    stored = {"fan_in_fan_out": True} if architecture == "gpt2" else {}  # in Conv1D
    adapters = [
        make_adapter(tmp_path / f"{n}", model_dir, rank=4 * n, targets=own, seed=n, **stored)
        for n, own in enumerate((targets, targets[:1]), start=1)
    ]
    runner = load(model_dir, walk(model_dir), adapters, device=device)
    slots, texts = [1, 0, 2, 1], prompts(40, 29, 50, 17)
    expected = [
        reference(model_dir, adapters[slot - 1] if slot else None, text)
        for slot, text in zip(slots, texts, strict=True)
    ]
    base = reference(model_dir, None, texts[0])
    assert_scored(runner, texts[3], slots[3], expected[3])
    assert (expected[0] - base).abs().max() > 0.1, "the adapters hardly do anything"
    for chunk in (1000, 7):
        found, _ = run(runner, texts, slots, chunk)
        for slot, own, theirs in zip(slots, found, expected, strict=True):
            difference = (own - theirs[-DECODED - 1 :]).abs().max().item()
            assert difference <= TOLERANCE, f"slot {slot}, chunk {chunk}"


def assert_scored(runner: Runner, text: list[int], slot: int, expected: torch.Tensor) -> None:
    assert runner.tells_prompts
    pages, asked = range(len(text)), Asked(text[1:], 1)
    ticket = runner.launch([Row(text, 0, pages, slot, GREEDY, 0, 0, asked=asked)])
    ticket.results()
    for own, token, wanted in zip(ticket.prompts()[0].logprobs, text[1:], expected, strict=False):
        assert own.logprob == pytest.approx(wanted[token].item(), abs=TOLERANCE)


def test_a_native_model_runs_through_its_modules_too(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", "qwen3", attention_bias=True)
    adapter = make_adapter(tmp_path / "adapter", model_dir)
    texts = prompts(40, 29)
    native, _ = run(load(model_dir, read_shape(model_dir), [adapter]), texts, [1, 0], 7)
    found, _ = run(load(model_dir, walk(model_dir), [adapter]), texts, [1, 0], 7)
    for own, theirs in zip(found, native, strict=True):
        assert (own - theirs).abs().max() <= TOLERANCE


def test_a_process_without_torch_is_told_the_same_shape(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model_dir = make_model(tmp_path / "model", "olmo3", sliding_window=8, layer_types=kinds)
    shape = walk(model_dir)
    assert shape_of(model_dir) == shape
    assert shape.windows == (8, None, 8)
    assert shape.projections["model.layers.*.self_attn.k_proj"] == (64, 32)
    assert shape.modules["model.layers.2.mlp.up_proj"] == (2, "model.layers.*.mlp.up_proj")
    assert shape.dtype == "float32"
    assert shape.eos_tokens == {1}
    edit_config(model_dir, quantization_config={"quant_method": "gptq", "bits": 4})
    checkpoint._walked.cache_clear()
    assert shape_of(model_dir) == walk(model_dir)
    edit_config(model_dir, quantization_config={"quant_method": "hqq"})
    checkpoint._walked.cache_clear()
    with pytest.raises(ModelUnsupported, match="quantization 'hqq' is not supported"):
        shape_of(model_dir)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("llama4_text", {}, "chunked_attention"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ("mamba", {}, "attention cannot be replaced"),
        ("bloom", {}, "attention cannot be replaced"),
        ("gptj", {}, "attention cannot be replaced"),
        ("granite_swa", {}, "attention sinks"),
        ("bert", {"is_decoder": False}, "architecture 'bert' computes other probabilities"),
    ],
)
def test_a_family_that_cannot_be_packed_is_refused(
    architecture: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    layers = len(settings.get("layer_types", "123"))
    model_dir = make_model(tmp_path, architecture, num_hidden_layers=layers, **settings)
    with pytest.raises(ModelUnsupported, match=words):
        load(model_dir, walk(model_dir))


def _mixes_neighbours(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    return mlp(x + 0.1 * x.roll(1, 1))


def _counts_tokens(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    return mlp((x * (1 + torch.arange(x.shape[1])[:, None] / 64)).to(x.dtype))


def _reorders_tokens(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    """Right for the base model, but rows would get each other's adapters."""
    return mlp(x.flip(1)).flip(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [_mixes_neighbours, _counts_tokens, _reorders_tokens])
def test_a_family_made_wrong_on_purpose_is_refused(
    wrong: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model(tmp_path, "olmo2", dtype=dtype)
    settings = {"dtype": str(dtype).removeprefix("torch.")}
    right = modeling_olmo2.Olmo2MLP.forward
    load(model_dir, walk(model_dir), **settings)
    monkeypatch.setattr(
        modeling_olmo2.Olmo2MLP, "forward", lambda self, x: wrong(partial(right, self), x)
    )
    with pytest.raises(ModelUnsupported, match="'olmo2' computes other probabilities"):
        load(model_dir, walk(model_dir), **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_right_family_where_rounding_weighs_much_passes(dtype: str, tmp_path: Path) -> None:
    """Other rounding sends tokens to other experts."""
    model_dir = make_model(tmp_path, "granitemoe", num_local_experts=4, num_experts_per_tok=2)
    load(model_dir, walk(model_dir), dtype=dtype)


@pytest.mark.parametrize("ignored", ["sliding_window", "softcap", "scaling"])
def test_a_setting_of_attention_that_is_lost_is_noticed(
    ignored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window is far wider than the rows of the check."""
    model_dir = make_model(tmp_path, "gemma2", sliding_window=256, attn_logit_softcapping=2.0)
    attend = transformers_model._attend

    def forgetful(*given: Any, **settings: Any) -> Any:
        return attend(*given, **{**settings, ignored: None})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "lorafleet", forgetful)
    shape = replace(walk(model_dir), windows=(256, None, 256))
    with pytest.raises(ModelUnsupported, match="'gemma2' computes other probabilities"):
        load(model_dir, shape)


def test_rows_stay_within_the_length_where_the_rotation_changes(tmp_path: Path) -> None:
    """Phi-3's longrope rotates all positions by other factors in longer sequences."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    length = {"original_max_position_embeddings": 64}
    model_dir = make_model(
        tmp_path / "model", "phi3", pad_token_id=2, rope_parameters=rope, **length
    )
    shape = walk(model_dir)
    assert shape.context == 64
    texts = prompts(40, 64)
    found, _ = run(load(model_dir, shape), texts, [0, 0], 1000)
    for own, text in zip(found, texts, strict=True):
        difference = own - reference(model_dir, None, text)[-DECODED - 1 :]
        assert difference.abs().max() <= TOLERANCE


def test_a_context_shorter_than_the_rows_of_the_check(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "gpt2", max_position_embeddings=24)
    (text,) = prompts(24)
    (found,), _ = run(load(model_dir, walk(model_dir)), [text], [0], 7)
    difference = found - reference(model_dir, None, text)[-DECODED - 1 :]
    assert difference.abs().max() <= TOLERANCE


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_a_tensor_that_is_missing_or_unknown_is_named(what: str, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "olmo2")
    shape, path = walk(model_dir), tmp_path / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    if what == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.1.mlp.up_proj.more"] = weight.clone()
    save_file(tensors, path)
    with pytest.raises(ModelUnsupported, match=f"{what} tensor model.layers.1.mlp.up_proj"):
        load(model_dir, shape)


def test_a_model_of_images_answers_text(tmp_path: Path) -> None:
    """Its other modules, which no token goes through, are nothing for an adapter."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": VOCAB, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2}
    images = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
    settings = {
        "text_config": sizes | text | {"sliding_window": 8, "max_position_embeddings": 512},
        "vision_config": images | {"patch_size": 14, "num_attention_heads": 2},
        "image_token_index": 1,
    }
    model_dir = make_model(tmp_path, "gemma3", **settings)
    shape = walk(model_dir)
    assert {path.split(".")[1] for path in shape.modules} == {"language_model"}
    assert (shape.layers, shape.vocab, shape.windows) == (3, VOCAB, (8, 8, 8))
    (prompt,) = prompts(30)
    (found,), _ = run(load(model_dir, shape), [prompt], [0], 7)
    difference = found - reference(model_dir, None, prompt)[-DECODED - 1 :]
    assert difference.abs().max() <= TOLERANCE


def test_weights_need_no_files(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "olmo2")
    (tmp_path / "model.safetensors").unlink()
    shape, texts = walk(model_dir), prompts(20)
    first, again, other = (
        run(load(model_dir, shape, load_format="dummy", seed=seed), texts, [0], 1000)[0][0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ranks_cannot_share_it(tmp_path: Path) -> None:
    shape = walk(make_model(tmp_path, "gpt2"))
    assert shape.divided(1) is shape
    with pytest.raises(ConfigError, match="tensor_parallel: 2 ranks cannot share gpt2"):
        shape.divided(2)


def test_code_in_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "olmo2")
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    edit_config(model_dir, model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(ModelUnsupported, match="trust_remote_code"):
        walk(model_dir)
