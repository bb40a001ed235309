"""The same launches on several runners, each made before the tokens of the last one are taken."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config import EngineConfig
from replica.adapters.image import read_image
from replica.engine.runner import Runner
from replica.model.checkpoint import shape_of
from replica.model.launch import Asked, Row, Ticket
from replica.model.sampling import Sampled
from replica.model.shape import FUSED_GROUPS
from replica.scheduling.request import PromptResult, Sampling, TokenLogprobs
from tests.models import TARGETS, make_adapter

VOCAB = 96
PAGE_TOKENS = 8
# Of log-probabilities: sums in another order make 3e-6 here.
TOLERANCE = 1e-4
TINY = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
"""As small as the interpreter's patience; of one query group, as a group more is a program more."""

REPORT = Sampling(temperature=0.0, logprobs=VOCAB)
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=1.0)
TELL = Sampling(temperature=0.0, prompt_logprobs=3, embeds=True)


def adapters_of(directory: Path, model_dir: str) -> list[str]:
    """Of mixed ranks and partial targets; slot n holds adapter n - 1."""
    some, every, one = ("q_proj", "v_proj", "down_proj"), TARGETS, r"mlp\.up_proj"
    projections = shape_of(model_dir).projections
    if "qkv_proj" in projections:
        some, every, one = ("qkv_proj", "down_proj"), sum(FUSED_GROUPS, ()), r"mlp\.gate_up_proj"
    elif tuple(projections) == TARGETS[:4]:  # of a mixture of experts
        some, every, one = ("q_proj", "v_proj"), TARGETS[:4], r"self_attn\.o_proj"
    settings = (
        {"rank": 4, "targets": some},
        {"rank": 24, "alpha": 30, "targets": every},
        {"rank": 8, "rank_pattern": {rf"layers\.0\.{one}": 17}, "targets": every},
    )
    return [
        make_adapter(directory / f"adapter-{n}", model_dir, seed=n, strength=0.15, **kind)
        for n, kind in enumerate(settings)
    ]


def load(model_dir: str, adapters: Sequence[str] = (), **settings: Any) -> Runner:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "batch_rows_max": 6,
        "step_tokens_max": 48,
        "rank_max": 32,
        "page_tokens": PAGE_TOKENS,
        "kv_memory": 2**20,
        "adapter_memory": 2**26,  # a GPU's would be all that it has
        "host_memory": 2**20,
        "directory_slots": 8,
    }
    config = EngineConfig(model=model_dir, **defaults | settings)
    runner = Runner(config, shape_of(model_dir))
    assert runner.capture_fallback == 0
    offset = 0
    for slot, path in enumerate(adapters, start=1):
        image = read_image(path, runner.shape, runner.dtype, base=runner.model)
        runner.arena.copy_in(offset, image)
        runner.arena.place(slot, offset, image.layout)
        offset += -(-image.bytes // runner.arena.alignment) * runner.arena.alignment
    return runner


@dataclass
class Text:
    """A prompt, then `wanted` tokens more. launched: of prompt and output, in launches so far."""

    prompt: Sequence[int]
    wanted: int
    slot: int = 0
    sampling: Sampling = REPORT
    seed: int = 0
    pages: Sequence[int] = ()
    launched: int = 0
    out: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.launched == len(self.prompt) + self.wanted - 1

    def row(self, chunk: int, last: int | None) -> Row:
        """last: its row in the launch whose tokens are not taken yet, if it has one there."""
        start, generated = self.launched, self.launched - len(self.prompt) + 1
        carry = None
        if generated <= 0:
            tokens = list(self.prompt[start : start + chunk])
        elif generated <= len(self.out):
            tokens = [self.out[generated - 1]]
        else:
            tokens, carry = [0], last
        self.launched += len(tokens)
        sampling = self.sampling if self.launched >= len(self.prompt) else None
        past = (self.prompt, list(self.out)) if self.sampling.looks_back else None
        asked = None
        if self.sampling.asks_of_prompt and generated <= 0:
            following = self.prompt[start + 1 : start + len(tokens) + 1]
            asked = Asked(following, self.sampling.prompt_logprobs or 0, sampling is not None)
        return Row(
            tokens,
            start,
            self.pages,
            self.slot,
            sampling,
            self.seed,
            max(generated, 0),
            carry,
            past,
            asked=asked,
        )


def texts_of(*settings: tuple[int, int, int, Sampling]) -> list[Text]:
    """Each of (tokens of the prompt, tokens wanted, slot, sampling), on pages of its own."""
    generator = torch.Generator().manual_seed(3)
    texts = []
    for n, (length, wanted, slot, sampling) in enumerate(settings):
        prompt = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        texts.append(Text(prompt, wanted, slot, sampling, seed=n))
    held = [-(-(length + wanted) // PAGE_TOKENS) for length, wanted, _, _ in settings]
    pages = list(range(sum(held)))  # all of them: nothing may be written to another's
    random.Random(5).shuffle(pages)
    for text, count in zip(texts, held, strict=True):
        text.pages, pages = pages[:count], pages[count:]
    return texts


def run_both(
    runners: Sequence[Runner], texts: Sequence[Text], rng: random.Random, chunk_max: int
) -> int:
    """Asserts that all runners sample alike; gives the number of launches.

    rng: which texts a launch has rows of, how long their chunks are, and in which order.
    """
    before: tuple[list[Text], list[Ticket]] = ([], [])
    launches = 0
    while before[0] or not all(text.over for text in texts):
        able = [text for text in texts if not text.over]
        taken = rng.sample(able, rng.randint(min(1, len(able)), len(able)))
        last = {id(text): i for i, text in enumerate(before[0])}
        rows = [text.row(rng.randint(1, chunk_max), last.get(id(text))) for text in taken]
        tickets = [runner.launch(rows) for runner in runners] if rows else []
        settle(*before)
        before = (taken, tickets)
        launches += 1
    return launches


def settle(texts: Sequence[Text], tickets: Sequence[Ticket]) -> None:
    if not texts:
        return
    expected, *others = [ticket.results() for ticket in tickets]
    for results in others:
        assert_alike(results, expected)
    told, *others_told = [ticket.prompts() for ticket in tickets]
    assert all(own == told.keys() for own in map(dict.keys, others_told))
    for own in others_told:
        for row, wanted in told.items():
            assert_told_alike(own[row], wanted)
    for text, sampled in zip(texts, expected, strict=True):
        if sampled is not None:
            text.out.append(sampled.token)


def assert_alike(found: Sequence[Sampled | None], expected: Sequence[Sampled | None]) -> None:
    assert [s and s.token for s in found] == [s and s.token for s in expected]
    for own, theirs in zip(found, expected, strict=True):
        if own is not None and theirs is not None and theirs.logprobs is not None:
            torch.testing.assert_close(
                all_logprobs(own.logprobs), all_logprobs(theirs.logprobs), atol=TOLERANCE, rtol=0
            )


def assert_told_alike(found: PromptResult, wanted: PromptResult) -> None:
    for own, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        assert (own.token, own.rank) == (theirs.token, theirs.rank)
        pairs = [(own.logprob, theirs.logprob)]
        pairs += zip((p for _, p in own.top), (p for _, p in theirs.top), strict=True)
        assert all(abs(a - b) <= TOLERANCE for a, b in pairs)
    states = [np.frombuffer(each.embedding or b"", "<f4") for each in (found, wanted)]
    np.testing.assert_allclose(*states, atol=TOLERANCE)


def all_logprobs(logprobs: TokenLogprobs | None) -> torch.Tensor:
    assert logprobs is not None and len(logprobs.top) == VOCAB
    values = torch.empty(VOCAB)
    for token, value in logprobs.top:
        values[token] = value
    return values
