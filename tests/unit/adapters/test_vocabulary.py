"""Adapters of embedding and head, in a mixed batch, give the log-probabilities of PEFT."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.adapter_paths import CONFIG_FILE
from cluster.errors import AdapterRefused
from replica.adapters.adapter_files import read_adapter
from replica.adapters.foreign_files import rewrite_foreign
from replica.adapters.image import read_image
from replica.model.checkpoint import shape_of
from replica.model.module_walk import walk
from replica.model.shape import Shape, read_shape
from tests.models import edit_config, make_adapter, make_model
from tests.packed import DECODED, load, prompts, reference, run

# PEFT remarks on tied weights, and that it saves embeddings.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:peft\..*")
TOLERANCE = 1e-4
BOTH = ["lm_head", "embed_tokens"]
KINDS: dict[str, dict[str, Any]] = {
    "both": {"targets": ("q_proj", *BOTH), "rank": 4},
    "head alone": {"targets": ("lm_head",), "rank": 5, "use_rslora": True},
    "tied": {"targets": ("up_proj", "embed_tokens"), "rank": 4, "ensure_weight_tying": True},
    "whole": {"targets": ("q_proj",), "modules_to_save": BOTH, "trained": True},
    "whole embedding": {
        "targets": ("q_proj", "lm_head"),
        "modules_to_save": ["embed_tokens"],
        "trained": True,
    },
    "plain": {"targets": ("q_proj", "v_proj")},
}


def as_kept(path: str, model_dir: str, shape: Shape) -> str:
    """A copy in the form that the store keeps."""
    copy = str(shutil.copytree(path, f"{path}-kept"))
    rewrite_foreign(copy, model_dir, shape.vocabulary)
    return copy


def check_mixed(model_dir: str, shape: Shape, adapters: Sequence[str]) -> None:
    """Each adapter beside the others and the base model."""
    runner = load(model_dir, shape, [as_kept(path, model_dir, shape) for path in adapters])
    slots = [0, *range(1, len(adapters) + 1), 1]
    texts = prompts(*range(17, 17 + 4 * len(slots), 4))
    expected = [
        reference(model_dir, adapters[slot - 1] if slot else None, text)
        for slot, text in zip(slots, texts, strict=True)
    ]
    base = reference(model_dir, None, texts[1])
    assert (expected[1] - base).abs().max() > 0.1, "the adapters hardly do anything"
    for chunk in (1000, 7):
        found, _ = run(runner, texts, slots, chunk)
        for slot, own, theirs in zip(slots, found, expected, strict=True):
            difference = (own - theirs[-DECODED - 1 :]).abs().max().item()
            assert difference <= TOLERANCE, f"slot {slot}, chunk {chunk}"


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixed_batch_is_what_peft_computes(tied: bool, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", tie_word_embeddings=tied)
    adapters = [
        make_adapter(tmp_path / str(n), model_dir, seed=n, **settings)
        for n, settings in enumerate(KINDS.values())
    ]
    check_mixed(model_dir, read_shape(model_dir), adapters)


@pytest.mark.parametrize(
    ("architecture", "embedding", "settings"),
    [
        ("gemma3_text", "embed_tokens", {"tie_word_embeddings": True}),  # it scales embeddings
        ("gpt2", "wte", {"tie_word_embeddings": True}),
        ("granite", "embed_tokens", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    ],
)
def test_a_model_of_transformers(
    architecture: str, embedding: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model_dir = make_model(tmp_path / "model", architecture, **settings)
    both = ("lm_head", embedding)
    adapters = [
        make_adapter(tmp_path / "lora", model_dir, rank=4, targets=both),
        make_adapter(
            tmp_path / "whole",
            model_dir,
            targets=both[:1],
            modules_to_save=[embedding],
            trained=True,
        ),
    ]
    check_mixed(model_dir, walk(model_dir), adapters)


def test_an_adapter_that_moved_and_left(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    shape = read_shape(model_dir)
    path = make_adapter(tmp_path / "a", model_dir, **KINDS["both"])
    runner = load(model_dir, shape)
    arena, image = runner.arena, read_image(as_kept(path, model_dir, shape), shape, torch.float32)
    size = -(-image.bytes // arena.alignment) * arena.alignment
    arena.copy_in(2 * size, image)
    arena.place(1, 2 * size, image.layout)
    target = size // 2 // arena.alignment * arena.alignment
    arena.slide(1, 2 * size, target, size)
    arena.memory[: target // 4] = float("nan")
    arena.memory[(target + size) // 4 :] = float("nan")
    (text,) = prompts(20)
    for adapter in (path, None):
        (found,), _ = run(runner, [text], [1], 1000)
        difference = found - reference(model_dir, adapter, text)[-DECODED - 1 :]
        assert difference.abs().max() <= TOLERANCE
        if adapter is not None:
            arena.clear(1)


def test_the_image_of_a_whole_weight(tmp_path: Path) -> None:
    """Read in pieces, it is what it is read at once; it takes vocabulary × hidden size elements."""
    model_dir = make_model(tmp_path / "model")
    shape = read_shape(model_dir)
    path = make_adapter(tmp_path / "a", model_dir, rank=4, **KINDS["whole"])
    kept = as_kept(path, model_dir, shape)
    whole = read_image(kept, shape, torch.bfloat16)
    assert torch.equal(read_image(kept, shape, torch.bfloat16, chunk_bytes=1000).flat, whole.flat)
    embedding, head = whole.layout.vocabulary
    assert (embedding.head, head.head) == (False, True)
    assert embedding.elements == head.elements == shape.vocab * shape.hidden
    assert head.b_offset + head.elements == len(whole.flat)
    assert read_adapter(kept, shape).parameters == len(whole.flat)


def test_copies_that_are_equal_take_nothing(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    shape = shape_of(model_dir)
    path = make_adapter(tmp_path / "a", model_dir, targets=("q_proj",), modules_to_save=BOTH)
    kept = as_kept(path, model_dir, shape)
    assert read_image(kept, shape, torch.float32).layout.vocabulary == ()


def test_a_module_that_is_listed_by_its_path_is_in_no_layer(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    shape = read_shape(model_dir)
    targets = ("q_proj", "model.layers.2.mlp.up_proj", "lm_head")
    path = make_adapter(tmp_path / "a", model_dir, targets=targets, layers_to_transform=[0])
    files = read_adapter(as_kept(path, model_dir, shape), shape)
    assert [*files.pairs, *files.vocabulary] == [(0, "q_proj"), (2, "up_proj"), "lm_head"]
    path = make_adapter(tmp_path / "b", model_dir, targets=("embed_tokens",))
    kept = as_kept(path, model_dir, shape)
    edit_config(kept, CONFIG_FILE, layers_to_transform=[0])
    with pytest.raises(AdapterRefused, match=r"embed_tokens in .* does not target it"):
        read_adapter(kept, shape)
    edit_config(kept, CONFIG_FILE, target_modules=["model.embed_tokens"])
    assert [*read_adapter(kept, shape).vocabulary] == ["model.embed_tokens"]


def test_all_linear_leaves_embedding_and_head_alone(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    shape = read_shape(model_dir)
    path = make_adapter(tmp_path / "a", model_dir, **KINDS["both"])
    edit_config(path, CONFIG_FILE, target_modules="all-linear")
    with pytest.raises(AdapterRefused, match=r"embed_tokens in .* does not target it"):
        read_adapter(as_kept(path, model_dir, shape), shape)
