"""The decoder's logits equal transformers' logits, however tokens are chunked and batched."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import EngineConfig
from replica.engine.runner import Runner
from replica.model.gather_executor import GatherExecutor, _cuts
from replica.model.launch import Row
from replica.model.shape import read_shape
from replica.scheduling.request import Sampling, TokenLogprobs
from tests.models import make_model

# Tolerance of log-probabilities, which are up to 16, so that one unit in the last place is 1e-6.
# Reordered sums of 96 products in three layers differ by a few units. A wrong mask gives 1e-2.
TOLERANCE = 1e-4
VOCAB = 320
GREEDY = Sampling(temperature=0.0)
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
KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SCALED = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.1,
    "logits_scaling": 2.5,
}
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
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
    "granite": ("granite", SCALED),
    "granite-biases-tied": (
        "granite",
        {**SCALED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite-rope-yarn": ("granite", {**SCALED, "rope_parameters": YARN}),
    "gemma2": ("gemma2", {"sliding_window": 20}),
    "gemma2-caps-biases-tied": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "attention_bias": True}
        | {"query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {"sliding_window": 20, **KINDS}),
    "gemma3-all-windows-capped": (
        "gemma3_text",
        {"sliding_window": 20, "final_logit_softcapping": 2.0},
    ),
    "gemma3-rope-linear": (
        "gemma3_text",
        {"sliding_window": 20, **KINDS}
        | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LLAMA3}},
    ),
    "phi3": ("phi3", {"pad_token_id": 2}),
    "phi3-window": ("phi3", {"pad_token_id": 2, "sliding_window": 20}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3-moe-normalized-tied": (
        "qwen3_moe",
        {**QWEN3_MOE, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
}


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def load(model_dir: str, **settings: Any) -> Runner:
    config = EngineConfig(model=model_dir, device="cpu", threads=1, batch_rows_max=8, **settings)
    return Runner(config, read_shape(model_dir))


def reference(model_dir: str, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Transformers' log-probabilities, [tokens, vocab] per text."""
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
    runner: Runner, texts: Sequence[Sequence[int]], decoded: int, chunk: int
) -> list[torch.Tensor]:
    """Log-probabilities after the prompt's last token and each later one, [tokens, vocab] per text.

    It prefills in chunks of `chunk` and decodes the last `decoded` tokens, in one batch with
    scattered pages.
    """
    everything = Sampling(logprobs=VOCAB)
    ids = iter(range(runner.memory.pages - 1, -1, -1))
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
            prompt = len(text) - decoded
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
            replay(runner, texts, 12, chunk)
            if batched
            else [replay(runner, [t], 12, chunk)[0] for t in texts]
        )
        for own, theirs in zip(found, expected, strict=True):
            difference = (own - theirs[-13:]).abs().max().item()
            assert difference <= TOLERANCE, f"chunk {chunk}, batched {batched}"


def generate(
    runner: Runner, texts: Sequence[Sequence[int]], length: int, chunk: int, sampling: Sampling
) -> list[list[int]]:
    """The output for each text, all in one batch. Each prompt starts one step after the one before,
    so that batches mix prefill and decode rows."""
    widest = -(-(max(map(len, texts)) + length) // runner.page_tokens)
    pages = [list(range(i * widest, (i + 1) * widest)) for i in range(len(texts))]
    done = [0] * len(texts)
    full = [list(text) for text in texts]
    for step in itertools.count():
        rows, owners = [], []
        for i, text in enumerate(full[: step + 1]):
            if len(text) == len(texts[i]) + length:
                continue
            end = min(len(text), done[i] + chunk)
            wanted = sampling if end == len(text) else None
            generated = len(text) - len(texts[i])
            rows.append(Row(text[done[i] : end], done[i], pages[i], 0, wanted, 0, generated))
            owners.append(i)
            done[i] = end
        if not rows:
            return [own[len(prompt) :] for own, prompt in zip(full, texts, strict=True)]
        for i, sampled in zip(owners, runner.run(rows), strict=True):
            if sampled is not None:
                full[i].append(sampled.token)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3", "mixtral"])
def test_greedy_text_is_the_same_one_by_one_and_batched(name: str, tmp_path: Path) -> None:
    architecture, settings = MODELS[name]
    runner = load(make_model(tmp_path, architecture, **settings))
    texts = prompts(3, 150, 17, 64, 1, 30)
    alone = [generate(runner, [text], 24, 1000, GREEDY)[0] for text in texts]
    assert generate(runner, texts, 24, 1000, GREEDY) == alone
    assert generate(runner, texts, 24, 13, GREEDY) == alone
    assert len({tuple(text) for text in alone}) == len(texts)


def test_draws_are_the_same_however_prompts_are_cut_and_requests_resumed(tmp_path: Path) -> None:
    runner = load(make_model(tmp_path))
    texts = prompts(30, 17)
    warm = Sampling(temperature=1.0)
    found = generate(runner, texts, 12, 1000, warm)
    assert generate(runner, texts, 12, 4, warm) == found
    assert generate(runner, texts, 12, 1000, GREEDY) != found
    # Tokens generated before the pages were lost are now part of the prompt.
    resumed = [[*text, *own[:5]] for text, own in zip(texts, found, strict=True)]
    assert generate(runner, resumed, 7, 1000, warm) == [own[5:] for own in found]


def test_what_a_former_owner_left_in_a_page_does_not_matter(tmp_path: Path) -> None:
    runner = load(make_model(tmp_path))
    texts = prompts(20, 5)
    before = replay(runner, texts, 3, 1000)
    # All pages except the padding page: a broken adapter may leave any value.
    assert isinstance(runner._executor, GatherExecutor)
    runner._executor.cache[:, :, :, : runner.memory.pages] = float("nan")
    for chunk in (1000, 2):
        after = replay(runner, texts, 3, chunk)
        for own, expected in zip(after, before, strict=True):
            torch.testing.assert_close(own, expected, atol=TOLERANCE, rtol=0)


def test_rows_of_very_different_lengths_attend_in_spans_of_their_own(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, max_position_embeddings=4096)
    runner = load(model_dir)
    texts = prompts(1500, 4, 40, 700)
    found = replay(runner, texts, 3, 2000)
    for own, theirs in zip(found, reference(model_dir, texts), strict=True):
        assert (own - theirs[-4:]).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize(
    ("counts", "used", "cuts"),
    [
        ([1], [9], [(0, 1)]),
        ([1, 1, 1], [8, 9, 12], [(0, 3)]),
        ([1, 1, 1], [1, 2, 128], [(0, 2), (2, 3)]),
        ([1] * 65, [1] * 64 + [3], [(0, 64), (64, 65)]),
        ([1, 1, 5, 7], [2, 2, 2, 2], [(0, 2), (2, 3), (3, 4)]),
        ([5, 7], [1, 1], [(0, 1), (1, 2)]),
    ],
)
def test_where_a_batch_is_cut_into_spans(
    counts: list[int], used: list[int], cuts: list[tuple[int, int]]
) -> None:
    assert list(_cuts(np.array(counts), np.array(used))) == cuts


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "gemma3"])
def test_bfloat16_is_as_near_as_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Both round differently, but their distances from the exact values are similar."""
    from transformers import AutoModelForCausalLM

    architecture, settings = MODELS[name]
    model_dir = make_model(tmp_path, architecture, **settings, initializer_range=0.05)
    texts = prompts(40, 57, 33)
    exact = reference(model_dir, texts)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    found = replay(load(model_dir, dtype="bfloat16"), texts, 12, 1000)
    for own, text, true in zip(found, texts, exact, strict=True):
        with torch.inference_mode():
            theirs = model(torch.tensor([text])).logits[0].float().log_softmax(-1)
        own_error = (own - true[-13:]).square().mean().sqrt().item()
        their_error = (theirs - true)[-13:].square().mean().sqrt().item()
        assert own_error <= 1.5 * their_error, (own_error, their_error)


def test_a_step_without_a_wanted_token_gives_none(tmp_path: Path) -> None:
    runner = load(make_model(tmp_path))
    (text,) = prompts(10)
    assert runner.run([Row(text, 0, [0], 0, None, 0, 0)]) == [None]


def test_a_token_that_is_not_known_yet_is_carried_from_the_launch_before(tmp_path: Path) -> None:
    runner = load(make_model(tmp_path))
    texts = prompts(9, 4, 13)
    expected = generate(runner, texts, 6, 1000, GREEDY)
    pages = [[2 * i, 2 * i + 1] for i in range(3)]
    tickets = [runner.launch([Row(t, 0, pages[i], 0, GREEDY, 0, 0) for i, t in enumerate(texts)])]
    order = [0, 1, 2]
    for step in range(5):  # in another order each time
        before, order = order, [order[1], order[2], order[0]]
        rows = [
            Row([0], len(texts[i]) + step, pages[i], 0, GREEDY, 0, step + 1, before.index(i))
            for i in order
        ]
        tickets.append(runner.launch(rows))
    found: list[list[int]] = [[], [], []]
    for step, ticket in enumerate(tickets):
        for row, sampled in enumerate(ticket.results()):
            assert sampled is not None
            found[(row + step) % 3].append(sampled.token)
    assert found == expected
