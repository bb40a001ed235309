"""A mixed batch of base and adapter rows gives the log-probabilities of transformers with PEFT."""

from pathlib import Path
from typing import Any

import pytest

from replica.adapters.image import read_image
from replica.model.shape import read_shape
from tests.models import make_adapter, make_model
from tests.packed import DECODED, load, prompts, reference, run

# Tolerance of log-probabilities, as in `test_decoder.py`. An adapter changes them by 0.1 or more.
TOLERANCE = 1e-4
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 4, "targets": ("q_proj", "v_proj")},
    {"rank": 8, "use_rslora": True, "alpha": 6},
    {
        "rank": 16,
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 5, r"layers\.\d.mlp.up_proj": 24},
        "alpha_pattern": {"o_proj": 3, "layers.0.mlp.down_proj": 50},
    },
    {"rank": 64, "targets": ("o_proj", "gate_proj", "down_proj"), "layers_to_transform": [0, 2]},
)


def adapters_of(directory: Path, model_dir: str) -> list[str]:
    return [
        make_adapter(directory / f"adapter-{n}", model_dir, seed=n, strength=0.08, **settings)
        for n, settings in enumerate(ADAPTERS)
    ]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixed_batch_is_what_peft_computes(architecture: str, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", architecture)
    adapters = adapters_of(tmp_path, model_dir)
    runner = load(model_dir, read_shape(model_dir), adapters)
    slots = [1, 0, 2, 3, 4, 2]
    texts = prompts(40, 29, 33, 50, 21, 17)
    expected = [
        reference(model_dir, adapters[slot - 1] if slot else None, text)
        for slot, text in zip(slots, texts, strict=True)
    ]
    base = reference(model_dir, None, texts[0])
    assert (expected[0] - base).abs().max() > 0.1, "the adapters hardly do anything"
    for chunk in (1000, 7):
        found, _ = run(runner, texts, slots, chunk)
        for slot, own, theirs in zip(slots, found, expected, strict=True):
            difference = (own - theirs[-DECODED - 1 :]).abs().max().item()
            assert difference <= TOLERANCE, f"slot {slot}, chunk {chunk}"


def test_greedy_text_is_the_same_one_by_one_and_batched(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    runner = load(model_dir, read_shape(model_dir), adapters_of(tmp_path, model_dir))
    slots = [1, 0, 2, 3, 4, 2, 1]
    texts = prompts(40, 29, 33, 50, 21, 17, 40)
    alone = [
        run(runner, [text], [slot], 1000, more=16)[1][0]
        for text, slot in zip(texts, slots, strict=True)
    ]
    for chunk in (1000, 7):
        assert run(runner, texts, slots, chunk, more=16)[1] == alone
    assert len({tuple(text) for text in alone}) > 3


def test_an_adapter_that_moved_or_gave_its_slot_to_another(tmp_path: Path) -> None:
    """Other rows keep decoding meanwhile. The slot's old weights must not be used."""
    model_dir = make_model(tmp_path / "model")
    adapters = adapters_of(tmp_path, model_dir)
    runner, shape = load(model_dir, read_shape(model_dir), adapters), read_shape(model_dir)
    arena = runner.arena
    texts = prompts(20, 20, 20)
    images = [read_image(path, shape, runner.dtype) for path in adapters]
    half = arena.capacity_bytes // 2
    for slot in range(1, 5):
        arena.clear(slot)
    arena.copy_in(half, images[1])
    arena.place(1, half, images[1].layout)
    arena.copy_in(0, images[0])
    arena.place(2, 0, images[0].layout)
    expected = {n: reference(model_dir, adapters[n], texts[0]) for n in (0, 1, 2)}

    def check(**slots: int) -> None:
        found, _ = run(runner, [texts[0]] * len(slots), list(slots.values()), 1000)
        for name, own in zip(slots, found, strict=True):
            theirs = expected[int(name[-1])][-DECODED - 1 :]
            assert (own - theirs).abs().max() <= TOLERANCE, name

    check(adapter1=1, adapter0=2)
    size = -(-images[1].bytes // arena.alignment) * arena.alignment
    arena.slide(1, half, half - arena.alignment * 2, size)
    check(adapter1=1, adapter0=2)
    arena.clear(2)
    arena.clear(1)
    arena.copy_in(0, images[2])
    arena.place(1, 0, images[2].layout)
    check(adapter2=1)
