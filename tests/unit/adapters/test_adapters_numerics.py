"""A mixed batch of base and adapter rows gives the log-probabilities of transformers with PEFT."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import EngineConfig
from replica.adapters.image import read_image
from replica.engine.runner import Runner
from replica.model.launch import Row
from replica.model.shape import read_shape
from replica.scheduling.request import Sampling
from tests.models import make_adapter, make_model

# Tolerance of log-probabilities, as in `test_decoder.py`. An adapter changes them by 0.1 or more.
TOLERANCE = 1e-4
VOCAB = 320
DECODED = 6
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


def load(model_dir: str, adapters: Sequence[str]) -> Runner:
    """Slot n holds adapter n - 1."""
    shape = read_shape(model_dir)
    runner = Runner(EngineConfig(model=model_dir, device="cpu", threads=1), shape)
    offset = 0
    for slot, path in enumerate(adapters, start=1):
        image = read_image(path, shape, runner.dtype)
        runner.arena.copy_in(offset, image)
        runner.arena.place(slot, offset, image.layout)
        offset += -(-image.bytes // runner.arena.alignment) * runner.arena.alignment
    return runner


def reference(model_dir: str, adapter: str | None, text: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after each token, [tokens, vocab]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(text)])).logits[0]
    return logits.log_softmax(-1)


def run(
    runner: Runner, texts: Sequence[Sequence[int]], slots: Sequence[int], chunk: int, more: int = 0
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Log-probabilities after each prompt, and `more` greedy tokens, in one batch.

    The last DECODED tokens of a text are decoded one by one. Each text starts one step after the
    one before, so that batches mix prefill and decode rows.
    """
    sampling = Sampling(temperature=0.0, logprobs=VOCAB)
    widest = -(-(max(map(len, texts)) + more) // runner.page_tokens)
    full, done = [list(text) for text in texts], [0] * len(texts)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in itertools.count():
        rows, owners = [], []
        for i, text in enumerate(full[: step + 1]):
            prompt = len(texts[i]) - DECODED
            if done[i] == len(texts[i]) + more:
                continue
            end = min(prompt, done[i] + chunk) if done[i] < prompt else done[i] + 1
            wanted = sampling if end >= prompt else None
            pages = range(i * widest, (i + 1) * widest)
            rows.append(Row(text[done[i] : end], done[i], pages, slots[i], wanted, 0, 0))
            owners.append(i)
            done[i] = end
        if not rows:
            break
        for i, sampled in zip(owners, runner.run(rows), strict=True):
            if sampled is None:
                continue
            assert sampled.logprobs is not None
            values = torch.empty(VOCAB)
            for token, value in sampled.logprobs.top:
                values[token] = value
            found[i].append(values)
            if done[i] == len(full[i]) < len(texts[i]) + more:
                full[i].append(sampled.token)
    greedy = [own[len(text) :] for own, text in zip(full, texts, strict=True)]
    return [torch.stack(own) for own in found], greedy


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixed_batch_is_what_peft_computes(architecture: str, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", architecture)
    adapters = adapters_of(tmp_path, model_dir)
    runner = load(model_dir, adapters)
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
    runner = load(model_dir, adapters_of(tmp_path, model_dir))
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
    runner, shape = load(model_dir, adapters), read_shape(model_dir)
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
