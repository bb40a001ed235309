"""Sampling: which tokens each parameter keeps, and what a draw depends on."""

import math
from typing import Any

import pytest
import torch

from replica.model.logit_rules import Draw
from replica.model.sampling import pick, sample, uniforms
from replica.scheduling.request import Sampling

EOS = frozenset({0})


def draw(seed: int = 0, position: int = 0, generated: int = 0, **sampling: Any) -> Draw:
    return Draw(Sampling(**sampling), seed, position, generated)


def logits(*probabilities: float, rows: int = 1) -> torch.Tensor:
    return torch.tensor([probabilities] * rows).log()


def frequencies(row: torch.Tensor, draws: int, **sampling: Any) -> torch.Tensor:
    found = sample(row.expand(draws, -1), [draw(position=i, **sampling) for i in range(draws)], EOS)
    return torch.bincount(torch.tensor([s.token for s in found]), minlength=row.shape[1]) / draws


def test_greedy_takes_the_most_likely_and_the_first_of_equals() -> None:
    values = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 2.0]])
    found = sample(values, [draw(temperature=0.0)] * 2, EOS)
    assert [s.token for s in found] == [1, 0]
    assert found[0].logprobs is None


def test_the_first_of_equals_in_a_long_bfloat16_row() -> None:
    values = torch.zeros(4, 8192, dtype=torch.bfloat16)
    values[:, [700, 701, 8000]] = 1.0
    assert [s.token for s in sample(values, [draw(temperature=0.0)] * 4, EOS)] == [700] * 4


def test_draws_follow_the_probabilities() -> None:
    found = frequencies(logits(0.1, 0.2, 0.3, 0.4), 20_000, temperature=1.0)
    assert found.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)


def test_temperature_sharpens() -> None:
    found = frequencies(logits(0.25, 0.75), 20_000, temperature=0.5)
    assert found.tolist() == pytest.approx([0.1, 0.9], abs=0.015)


def test_top_k_keeps_the_k_best() -> None:
    found = frequencies(logits(0.1, 0.2, 0.3, 0.4), 5_000, top_k=2)
    assert found.tolist() == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.03)


@pytest.mark.parametrize("top_k", [0, 4, 5, 1000])
def test_top_k_of_all_or_none_keeps_all(top_k: int) -> None:
    assert (frequencies(logits(0.25, 0.25, 0.25, 0.25), 2_000, top_k=top_k) > 0).all()


def test_top_p_keeps_the_best_up_to_the_one_that_reaches_p() -> None:
    row = logits(0.1, 0.2, 0.3, 0.4)
    assert (frequencies(row, 5_000, top_p=0.6) > 0).tolist() == [False, False, True, True]
    assert (frequencies(row, 5_000, top_p=0.75) > 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_top_p_keeps_at_least_one(top_p: float) -> None:
    assert frequencies(logits(0.1, 0.2, 0.3, 0.4), 100, top_p=top_p)[3] == 1


def test_top_p_comes_after_top_k() -> None:
    # The best two have 0.77 of the normalized 0.4, 0.3 and 0.2, but 0.7 of all four tokens.
    found = frequencies(logits(0.1, 0.2, 0.3, 0.4), 5_000, top_k=3, top_p=0.75)
    assert (found > 0).tolist() == [False, False, True, True]


def test_each_row_has_its_own_settings() -> None:
    values = logits(0.1, 0.2, 0.3, 0.4, rows=4).repeat(500, 1)
    one_round = [
        draw(temperature=0.0),
        draw(top_k=1),
        draw(top_p=0.1),
        draw(),
    ]
    draws = [Draw(d.sampling, seed, 0, 0) for seed in range(500) for d in one_round]
    tokens = torch.tensor([s.token for s in sample(values, draws, EOS)]).view(500, 4)
    assert (tokens[:, :3] == 3).all()
    assert set(tokens[:, 3].tolist()) == {0, 1, 2, 3}


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    torch.manual_seed(0)
    row = torch.randn(1, 100)
    alone = sample(row, [draw(seed=7, position=11)], EOS)[0].token
    crowd = [draw(seed=s, position=p) for s in range(5, 9) for p in range(10, 13)]
    crowded = sample(row.expand(len(crowd), -1), crowd, EOS)
    assert crowded[crowd.index(draw(seed=7, position=11))].token == alone
    assert len({s.token for s in crowded}) > 5


def test_uniforms_are_spread_and_unlike_for_neighbours() -> None:
    values = uniforms([0] * 10_000, range(10_000))
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.var() - 1 / 12) < 0.005
    others = uniforms([1] * 10_000, range(10_000))
    shifted = uniforms([0] * 10_000, range(1, 10_001))
    for unlike in (others, shifted):
        assert abs(((values - 0.5) * (unlike - 0.5)).mean()) < 0.005

    # No seed repeats another seed's later positions.
    assert uniforms([0], [1]) != uniforms([0x9E3779B97F4A7C15], [0])


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
def test_any_seed_will_do(seed: int) -> None:
    assert 0 <= uniforms([seed], [0])[0] < 1


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_nothing_of_probability_zero_is_picked(uniform: float) -> None:
    torch.manual_seed(0)
    probabilities = torch.zeros(1000, 64)
    probabilities[:, 16:48] = torch.rand(1000, 32) * torch.rand(1000, 1)
    found = pick(probabilities, torch.full((1000, 1), uniform))
    assert (probabilities.gather(1, found[:, None]) > 0).all()
    assert uniform != 0 or (found == 16).all()
    assert uniform != 1 - 2**-24 or (found >= 46).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_before_min_tokens_nothing_ends_the_request(temperature: float) -> None:
    row = logits(0.5, 0.3, 0.2)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "min_tokens": 3,
        "stop_tokens": frozenset({1, 999}),
    }
    for seed in range(50):
        early = draw(seed=seed, generated=2, **settings)
        assert sample(row, [early], EOS)[0].token == 2
    assert sample(row, [draw(generated=3, temperature=0.0)], EOS)[0].token == 0


def test_ignore_eos_does_not_mask_it() -> None:
    assert sample(logits(0.9, 0.1), [draw(temperature=0.0, ignore_eos=True)], EOS)[0].token == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    row = logits(0.5, 0.3, 0.2)
    settings = draw(temperature=0.1, top_k=1, min_tokens=1, logprobs=2)
    found = sample(row, [settings], EOS)[0]
    assert found.token == 1 and found.logprobs is not None
    assert found.logprobs.token == 1
    assert found.logprobs.logprob == pytest.approx(math.log(0.3))
    assert [token for token, _ in found.logprobs.top] == [0, 1]
    assert found.logprobs.top[0][1] == pytest.approx(math.log(0.5))


def test_logprobs_only_where_asked_for_and_as_many() -> None:
    draws = [draw(temperature=0.0, logprobs=n) for n in (None, 0, 2, 50)]
    found = sample(logits(0.2, 0.3, 0.5, rows=4), draws, EOS)
    assert found[0].logprobs is None
    assert [len(s.logprobs.top) for s in found[1:] if s.logprobs is not None] == [0, 2, 3]


def test_each_row_reports_its_own_logprobs() -> None:
    values = torch.cat([logits(0.5, 0.3, 0.2), logits(0.1, 0.2, 0.7), logits(0.4, 0.6, 0.0)])
    draws = [draw(temperature=0.0, logprobs=n) for n in (1, None, 0)]
    found = [s.logprobs for s in sample(values, draws, EOS)]
    assert [p and p.logprob for p in found] == [
        pytest.approx(math.log(0.5)),
        None,
        pytest.approx(math.log(0.6)),
    ]


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, 5), [], EOS) == []


def test_a_broken_row_does_not_disturb_its_neighbours() -> None:
    values = logits(0.1, 0.9, rows=3)
    values[1] = float("nan")
    for temperature in (0.0, 1.0):
        found = sample(values, [draw(temperature=temperature, top_k=1, top_p=0.9)] * 3, EOS)
        assert found[0].token == found[2].token == 1
        assert 0 <= found[1].token < 2


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"logprobs": 1}, {"min_tokens": 2}],
)
def test_rows_that_are_not_finite_are_told(sampling: dict[str, Any]) -> None:
    values = torch.tensor([[0.0, 3.0, 1.0]] * 6)
    values[1] = math.nan
    values[2, 1] = math.nan
    values[3, 2] = math.inf
    values[4] = -math.inf
    values[5, 1] = -math.inf  # only ruled out
    draws = [draw(position=row, **sampling) for row in range(6)]
    found = sample(values, draws, EOS)
    assert [s.finite for s in found] == [True, False, False, False, False, True]
    alone = sample(values[[0, 5]], [draws[0], draws[5]], EOS)
    assert [found[0], found[5]] == alone
