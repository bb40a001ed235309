"""The decoder's logits are transformers' logits, however the tokens are cut and batched."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import EngineConfig
from replica.request import Sampling, TokenLogprobs
from replica.runner import Row, Runner
from replica.shape import read_shape
from tests.models import make_model

TOLERANCE = 1e-5
VOCAB = 320
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-sharded": ("llama", {"shard_bytes": 50_000}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


@dataclass
class Sequence_:
    """A text with pages of its own."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def load(model_dir: str, **settings: Any) -> Runner:
    config = EngineConfig(model=model_dir, device="cpu", threads=1, batch_rows_max=8, **settings)
    return Runner(config, read_shape(model_dir))


def reference(model_dir: str, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Transformers' log-probabilities, [tokens, vocab] a text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    with torch.inference_mode():
        return [model(torch.tensor([list(t)])).logits[0].log_softmax(-1) for t in texts]


def all_logprobs(logprobs: TokenLogprobs | None) -> torch.Tensor:
    assert logprobs is not None
    values = torch.empty(VOCAB)
    for token, value in logprobs.top:
        values[token] = value
    return values


def replay(
    runner: Runner, texts: Sequence[Sequence[int]], prompt: int, chunk: int
) -> list[torch.Tensor]:
    """Log-probabilities after each token from the prompt's last on: prefill in chunks of `chunk`,
    then decode the rest of the text, all texts in one batch, pages scattered."""
    everything = Sampling(logprobs=VOCAB)
    ids = iter(range(runner.page_count - 1, -1, -1))
    pages: list[list[int]] = [[] for _ in texts]
    for _ in range(-(-max(map(len, texts)) // runner.page_tokens)):
        for own in pages:
            own.append(next(ids))
    done = [0] * len(texts)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        rows, owners = [], []
        for i, text in enumerate(texts):
            if done[i] == len(text):
                continue
            end = min(prompt, done[i] + chunk) if done[i] < prompt else done[i] + 1
            rows.append(
                Row(
                    tokens=text[done[i] : end],
                    position=done[i],
                    pages=pages[i],
                    slot=0,
                    sampling=everything if end >= prompt else None,
                    seed=0,
                    generated=max(0, end - prompt),
                )
            )
            owners.append(i)
            done[i] = end
        for i, sampled in zip(owners, runner.run(rows), strict=True):
            if sampled is not None:
                found[i].append(all_logprobs(sampled.logprobs))
    return [torch.stack(f) for f in found]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, settings = MODELS[name]
    model_dir = make_model(tmp_path, architecture, **settings)
    runner = load(model_dir)
    texts = prompts(40, 57, 33)
    expected = reference(model_dir, texts)
    for chunk, batched in itertools.product((1000, 7), (True, False)):
        found = (
            replay(runner, texts, 30, chunk)
            if batched
            else [replay(runner, [t], 30, chunk)[0] for t in texts]
        )
        for own, theirs in zip(found, expected, strict=True):
            difference = (own - theirs[29:]).abs().max().item()
            assert difference <= TOLERANCE, f"chunk {chunk}, batched {batched}"
