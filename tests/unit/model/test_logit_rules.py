"""Each sampling parameter against its formula in plain Python, alone and in one batch."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from replica.model.launch import Row
from replica.model.logit_rules import Draw, draw_of, rules_of
from replica.model.sampling import choose, prepare, sample
from replica.scheduling.request import Sampling

VOCAB = 24
EOS = frozenset({0})
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def expected(logits: Sequence[float], draw: Draw, last: int | None = None) -> list[float]:
    """The rules as vLLM documents them, one token at a time."""
    sampling = draw.sampling
    output = [*draw.output] + ([] if last is None else [last])
    text, counts = [*draw.prompt, *output], Counter(output)
    new = []
    for token, logit in enumerate(logits):
        if sampling.allowed_tokens is not None and token not in sampling.allowed_tokens:
            logit = -math.inf
        for word in sampling.bad_words:
            if word[-1] == token and tuple(text[len(text) - len(word) + 1 :]) == word[:-1]:
                logit = -math.inf
        if draw.generated < sampling.min_tokens and token in EOS | sampling.stop_tokens:
            logit = -math.inf
        logit += dict(sampling.logit_bias).get(token, 0.0)
        if token in text:
            rate = sampling.repetition_penalty
            logit = logit / rate if logit > 0 else logit * rate
        logit -= sampling.frequency_penalty * counts[token]
        logit -= sampling.presence_penalty * (token in counts)
        new.append(logit)
    return new


CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 0.8},
    "frequency": {"frequency_penalty": -0.6},
    "all penalties": {
        "repetition_penalty": 0.6,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.3,
    },
    "bias": {"logit_bias": ((3, 2.5), (7, -100.0))},
    "allowed": {"allowed_tokens": (1, 2, 3, 5, 8)},
    "a bad word of one token": {"bad_words": ((4,),)},
    "bad words": {"bad_words": ((9, 4), (6, 5, 4), (11, 12))},
    "min tokens": {"min_tokens": 50, "stop_tokens": frozenset({2})},
    "everything": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": ((1, 1.0),),
        "allowed_tokens": tuple(range(1, 20)),
        "bad_words": ((5, 4), (3,)),
        "min_tokens": 50,
    },
}


def draws(seed: int, *, carried: bool) -> tuple[list[Draw], list[int]]:
    """One draw a case, and each one's last token."""
    rng = random.Random(seed)
    made, last = [], []
    for case in CASES.values():
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
        output = [*(rng.randrange(VOCAB) for _ in range(rng.randrange(6))), 6, 5]
        output.append(rng.choice([5, 9, 11]))
        last.append(output.pop() if carried else 0)
        sampling = Sampling(temperature=0.0, **case)
        made.append(Draw(sampling, 0, 0, len(output), prompt, output, carried))
    return made, last


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_rule_follows_its_formula_in_one_batch(
    seed: int, carried: bool, device: torch.device
) -> None:
    made, last = draws(seed, carried=carried)
    torch.manual_seed(seed)
    logits = torch.randn(len(made), VOCAB) * 3
    rules = rules_of(made, EOS, VOCAB, device)
    assert rules is not None
    previous = torch.tensor(last, device=device) if carried else None
    found = rules.apply(logits.to(device), previous)
    for row, draw in enumerate(made):
        wanted = expected(logits[row].tolist(), draw, last[row] if carried else None)
        # fp32: a few operations on numbers up to 100.
        assert found[row].tolist() == pytest.approx(wanted, abs=1e-5), list(CASES)[row]


def test_rows_without_rules_keep_their_bits_and_logits_are_not_overwritten() -> None:
    logits = torch.randn(2, VOCAB).to(torch.bfloat16)
    before = logits.clone()
    biased = Draw(Sampling(logit_bias=((3, 5.0),)), 0, 0, 0)
    rules = rules_of([Draw(Sampling(), 0, 0, 0), biased], EOS, VOCAB, CPU)
    assert rules is not None
    found = rules.apply(logits, None)
    assert torch.equal(logits, before)
    assert torch.equal(found[0], before[0].float())
    assert found[1, 3] == before[1, 3].float() + 5.0


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_a_grammars_mask_holds_may_come_next(device: torch.device) -> None:
    sampling = Sampling(temperature=0.0)
    mask = np.array([1 << 4 | 1 << 9], np.int32)
    made = [Draw(sampling, 0, 0, 0), Draw(sampling, 0, 0, 0, mask=mask)]
    logits = torch.zeros(2, VOCAB)
    logits[:, 7], logits[:, 9] = 5.0, 1.0
    assert [s.token for s in sample(logits.to(device), made, EOS)] == [7, 9]


def test_a_batch_that_asks_for_nothing_has_no_rules() -> None:
    plain = [Draw(Sampling(), 0, 0, 0), Draw(Sampling(top_k=3, min_p=0.1), 0, 0, 5)]
    assert rules_of(plain, EOS, VOCAB, CPU) is None


def test_min_p_keeps_what_reaches_its_share_of_the_best() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().expand(3000, -1)
    made = [Draw(Sampling(min_p=0.3), 0, i, 0) for i in range(3000)]
    metadata = prepare(made, EOS, 4, CPU)
    tokens = choose(logits, metadata).tokens[:, 0]
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    # The standard error of each share is below 0.01.
    assert shares.tolist() == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.04)


def test_min_p_follows_the_temperature() -> None:
    """At temperature 2, 0.1 / 0.5 has the square root of its share, 0.447."""
    logits = torch.tensor([[0.5, 0.4, 0.1]]).log().expand(500, -1)
    made = [Draw(Sampling(min_p=0.44, temperature=2.0), 0, i, 0) for i in range(500)]
    assert {s.token for s in sample(logits, made, EOS)} == {0, 1, 2}
    made = [Draw(Sampling(min_p=0.44), 0, i, 0) for i in range(500)]
    assert {s.token for s in sample(logits, made, EOS)} == {0, 1}


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(1, VOCAB)
    biased = Draw(Sampling(temperature=0.0, logit_bias=((3, 100.0),), logprobs=1), 0, 0, 0)
    (sampled,) = sample(logits, [biased], EOS)
    assert sampled.token == 3
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(logits[0].log_softmax(-1)[3]), abs=1e-6)


def test_a_rows_past_does_not_hold_the_token_it_carries() -> None:
    sampling = Sampling(presence_penalty=1.0)
    row = Row([0], 4, [0], 0, sampling, 7, 2, carry=0, past=((1, 2, 3), [4]))
    draw = draw_of(row)
    assert draw is not None
    assert (draw.prompt, draw.output, draw.carried) == ((1, 2, 3), [4], True)
