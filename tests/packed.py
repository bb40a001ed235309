"""Runs packed batches of several adapters, and transformers with PEFT for comparison."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from cluster.config import EngineConfig
from replica.adapters.image import read_image
from replica.engine.runner import Runner
from replica.model.launch import Row
from replica.model.shape import Shape
from replica.scheduling.request import Sampling

VOCAB = 320
DECODED = 6


def load(model_dir: str, shape: Shape, adapters: Sequence[str] = (), **settings: Any) -> Runner:
    """Slot n holds adapter n - 1."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "threads": 1,
        "kv_memory": 2**24,
        "adapter_memory": 2**24,  # on a GPU, pages would be where the adapters are put
    }
    config = EngineConfig(model=model_dir, **defaults | settings)
    runner = Runner(config, shape)
    offset = 0
    for slot, path in enumerate(adapters, start=1):
        image = read_image(path, shape, runner.dtype, base=runner.model)
        runner.arena.copy_in(offset, image)
        runner.arena.place(slot, offset, image.layout)
        offset += -(-image.bytes // runner.arena.alignment) * runner.arena.alignment
    return runner


def reference(model_dir: str, adapter: str | None, text: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after each token, [tokens, vocab]."""
    model = by_transformers(model_dir, adapter)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(text)])).logits[0]
    return logits.log_softmax(-1)


def by_transformers(model_dir: str, adapter: str | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return PeftModel.from_pretrained(model, adapter)
    return model


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
