"""The families of our own decoder, with adapters of all kinds in a mixed batch, give the
log-probabilities of transformers with PEFT; configurations that it does not cover run through
transformers.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from replica.adapters.foreign_files import rewrite_foreign
from replica.model.checkpoint import identity, is_native, shape_of
from replica.model.launch import Asked, Row
from replica.model.module_walk import walk
from replica.model.shape import ModelShape, TransformersShape
from replica.scheduling.request import Sampling
from tests.models import TARGETS, edit_config, make_adapter, make_model
from tests.packed import DECODED, load, prompts, reference, run
from tests.quantized import SCHEMES, write_quantized

# PEFT remarks on tied weights, and that it saves embeddings.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:peft\..*")
TOLERANCE = 1e-4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SCALED = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.1,
    "logits_scaling": 2.5,
}
MIXTRAL: dict[str, Any] = {"num_local_experts": 4}
QWEN3_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "llama": ("llama", TARGETS, {}),
    "granite": ("granite", TARGETS, SCALED),
    "granite, biases": ("granite", TARGETS, {**SCALED, "attention_bias": True, "mlp_bias": True}),
    "gemma2": (
        "gemma2",
        TARGETS,
        {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0}
        | {"query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "gemma3_text",
        TARGETS,
        {"sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("phi3", FUSED, {"pad_token_id": 2}),
    "phi3, window": ("phi3", FUSED, {"pad_token_id": 2, "sliding_window": 8}),
    "mixtral": ("mixtral", ATTENTION, MIXTRAL),
    "mixtral, window": ("mixtral", ATTENTION, {**MIXTRAL, "sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", ATTENTION, QWEN3_MOE),
    "qwen3_moe, normalized": (
        "qwen3_moe",
        ATTENTION,
        {**QWEN3_MOE, "norm_topk_prob": True, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 8},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_what_peft_computes(family: str, tmp_path: Path) -> None:
    architecture, targets, settings = FAMILIES[family]
    model_dir = make_model(tmp_path / "model", architecture, **settings)
    kinds: tuple[dict[str, Any], ...] = (
        {"targets": targets, "rank": 4},
        {"targets": targets[::2], "rank": 6, "use_dora": True},
        {"targets": (targets[0], "lm_head", "embed_tokens"), "rank": 8},
        {
            "targets": targets[-1:],
            "modules_to_save": ["lm_head", "embed_tokens"],
            "trained": True,
        },
    )
    adapters = [
        make_adapter(tmp_path / f"{n}", model_dir, seed=n, **kind) for n, kind in enumerate(kinds)
    ]
    shape = shape_of(model_dir)
    assert isinstance(shape, ModelShape)
    slots, texts = [1, 0, 2, 1, 3, 4], prompts(40, 29, 50, 17, 33, 21)
    expected = [
        reference(model_dir, adapters[slot - 1] if slot else None, text)
        for slot, text in zip(slots, texts, strict=True)
    ]
    for slot, text, theirs in zip(slots, texts, expected, strict=True):
        strength = (theirs - reference(model_dir, None, text)).abs().max()
        assert (strength > 0.05) == (slot > 0), f"the adapter of slot {slot} hardly does anything"
    for path in adapters:
        rewrite_foreign(path, model_dir, shape.vocabulary)
    runner = load(model_dir, shape, adapters)
    for chunk in (1000, 7):
        found, _ = run(runner, texts, slots, chunk)
        for slot, own, theirs in zip(slots, found, expected, strict=True):
            difference = (own - theirs[-DECODED - 1 :]).abs().max().item()
            assert difference <= TOLERANCE, f"slot {slot}, chunk {chunk}"
    greedy = Sampling(temperature=0.0)
    row = Row(texts[4], 0, range(4), 3, greedy, 0, 0, asked=Asked(texts[4][1:], 1))
    ticket = runner.launch([row])
    ticket.results()
    told = ticket.prompts()[0].logprobs
    for own_token, token, wanted in zip(told, texts[4][1:], expected[4], strict=False):
        assert own_token.logprob == pytest.approx(wanted[token].item(), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"rope_parameters": {"rope_type": "longrope"}}),
        ("qwen2", {"rope_scaling": {"type": "longrope"}}),
        ("qwen3", {"partial_rotary_factor": 0.5}),
        ("granite", {"some_new_flag": True}),
        ("granite", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("granite", {"hidden_act": "gelu"}),
        ("granite", {"rms_norm_eps": None}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma2", {"final_logit_softcapping": None}),  # its default is 30
        ("gemma2", {"layer_types": ["full_attention"]}),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}),
        ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5}),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}),
        ("mixtral", {"shared_expert": 1}),
        ("mixtral", {"attention_bias": True}),
        ("mixtral", {"num_local_experts": None}),  # its default is 8
        ("mixtral", {"num_experts": 4}),
        ("mixtral", {"num_experts_per_tok": 5}),
        ("mixtral", {"intermediate_size": 36}),  # whose rows grouped matmuls do not take in bf16
        ("mixtral", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"moe_intermediate_size": None}),
    ],
)
def test_a_configuration_that_is_not_covered_runs_through_transformers(
    architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    experts = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}
    model_dir = make_model(tmp_path, architecture, pad_token_id=2, **experts.get(architecture, {}))
    assert is_native(model_dir)
    edit_config(model_dir, **fields)
    assert not is_native(model_dir)


def test_what_adapters_fit_makes_a_models_identity(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one", "llama")
    again = make_model(tmp_path / "again", "llama", rms_norm_eps=1e-5)
    others = [
        make_model(tmp_path / "mistral", "mistral"),
        make_model(tmp_path / "longer", "llama", num_hidden_layers=4),
        make_model(tmp_path / "wider", "llama", vocab_size=400),
    ]
    assert identity(one) == identity(again)
    assert len({identity(one), *map(identity, others)}) == 4


def test_what_is_off_is_no_unknown_feature(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "granite")
    edit_config(model_dir, some_new_flag=False)
    assert is_native(model_dir)


LONGROPE = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("phi3", {"pad_token_id": 2, "rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama", {"hidden_act": "gelu"}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("mistral", {"rope_parameters": LONGROPE}),
    ],
)
def test_it_is_served_so(architecture: str, fields: dict[str, Any], tmp_path: Path) -> None:
    if fields.get("rope_parameters") is LONGROPE:
        factors = [1.0] * 8
        fields = {"rope_parameters": LONGROPE | {"short_factor": factors, "long_factor": factors}}
    model_dir = make_model(tmp_path, architecture, **fields)
    shape = shape_of(model_dir)
    assert isinstance(shape, TransformersShape)
    (text,) = prompts(40)
    (found,), _ = run(load(model_dir, shape), [text], [0], 7)
    difference = found - reference(model_dir, None, text)[-DECODED - 1 :]
    assert difference.abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_modules_give_the_same(family: str, tmp_path: Path) -> None:
    architecture, targets, settings = FAMILIES[family]
    model_dir = make_model(tmp_path / "model", architecture, **settings)
    adapter = make_adapter(tmp_path / "adapter", model_dir, targets=targets)
    texts = prompts(40, 29)
    native, _ = run(load(model_dir, shape_of(model_dir), [adapter]), texts, [1, 0], 7)
    found, _ = run(load(model_dir, walk(model_dir), [adapter]), texts, [1, 0], 7)
    for own, theirs in zip(native, found, strict=True):
        assert (own - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_need_no_files(family: str, tmp_path: Path) -> None:
    architecture, _, settings = FAMILIES[family]
    model_dir = make_model(tmp_path, architecture, **settings)
    (tmp_path / "model.safetensors").unlink()
    runner = load(model_dir, shape_of(model_dir), load_format="dummy", seed=1)
    (found,), _ = run(runner, prompts(20), [0], 1000)
    assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_on_parameters_holds(family: str, tmp_path: Path) -> None:
    architecture, _, settings = FAMILIES[family]
    model_dir = make_model(tmp_path, architecture, **settings)
    tensors = load_file(tmp_path / "model.safetensors").values()
    matrices = sum(each.numel() for each in tensors if each.dim() == 2)
    shape = shape_of(model_dir)
    assert isinstance(shape, ModelShape)
    assert shape.parameters == matrices + shape.tied_embeddings * shape.vocab * shape.hidden


@pytest.mark.parametrize("architecture", ["granite", "phi3", "gemma2", "gemma3_text"])
def test_a_quantized_checkpoint_is_dequantized(architecture: str, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", architecture, pad_token_id=2)
    quantized = write_quantized(plain, tmp_path / "quantized", SCHEMES["awq"])
    (text,) = prompts(29)
    (found,), _ = run(load(quantized, shape_of(quantized)), [text], [0], 7)
    difference = found - reference(plain, None, text)[-DECODED - 1 :]
    assert difference.abs().max() <= TOLERANCE
