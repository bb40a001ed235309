"""Logits → tokens and logprobs; a draw depends on nothing but (seed, position)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from replica.request import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row's token is chosen by. position: of the token being drawn.

    generated: tokens generated so far; below `sampling.min_tokens` nothing may end the request.
    """

    sampling: Sampling
    seed: int
    position: int
    generated: int


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None = None


def sample(
    logits: torch.Tensor, draws: Sequence[Draw], eos_tokens: frozenset[int]
) -> list[Sampled]:
    """One token a row of logits [rows, vocab]: temperature, top-k, top-p, draw.

    Logprobs are of the logits as they come in, before any of these.
    """
    raw = logits
    early = [i for i, d in enumerate(draws) if d.generated < d.sampling.min_tokens]
    if early:
        logits = logits.clone()
        for i in early:
            ends = sorted(
                t for t in eos_tokens | draws[i].sampling.stop_tokens if t < logits.shape[1]
            )
            logits[i, ends] = float("-inf")
    # The first of the largest, as `argmax`, which takes four times as long on a CPU.
    chosen = logits.max(-1).indices
    random = [i for i, d in enumerate(draws) if d.sampling.temperature > 0]
    if random:
        rows = torch.tensor(random, device=logits.device)
        chosen[rows] = _draw(logits[rows].float(), [draws[i] for i in random])
    tokens = chosen.tolist()
    reported = [i for i, d in enumerate(draws) if d.sampling.logprobs is not None]
    logprobs = _logprobs(raw, tokens, draws, reported) if reported else {}
    return [Sampled(token, logprobs.get(i)) for i, token in enumerate(tokens)]


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    logits = logits / column([d.sampling.temperature for d in draws])
    if any(d.sampling.top_k for d in draws):
        logits = _top_k(logits, [d.sampling.top_k for d in draws])
    probabilities = logits.softmax(-1)
    narrow = [i for i, d in enumerate(draws) if d.sampling.top_p < 1]
    if narrow:
        rows = torch.tensor(narrow, device=logits.device)
        top_p = column([draws[i].sampling.top_p for i in narrow])
        probabilities[rows] = _top_p(probabilities[rows], top_p)
    uniform = uniforms([d.seed for d in draws], [d.position for d in draws])
    return pick(probabilities, column(uniform.tolist()))


def pick(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token in whose share of the sum `uniform` [rows, 1] lies; never one of probability 0."""
    sums = probabilities.cumsum(-1)
    # With 24 bits, uniform · total < total in float32 too: the search ends before the end.
    target = uniform * sums[:, -1:]
    # But for a row that is not finite, which may give any token, as long as it is one.
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp_(max=sums.shape[1] - 1)


def _top_k(logits: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    """Keeps each row's k largest; 0 keeps all. Equals of the k-th stay too."""
    vocab = logits.shape[1]
    counts = [k if 0 < k < vocab else vocab for k in top_k]
    limited = [i for i, k in enumerate(counts) if k < vocab]
    if not limited:
        return logits
    best = logits[limited].topk(max(counts[i] for i in limited)).values
    last = torch.tensor([[counts[i] - 1] for i in limited], device=logits.device)
    bound = torch.full_like(logits[:, :1], float("-inf"))
    bound[limited] = best.gather(1, last)
    return logits.masked_fill(logits < bound, float("-inf"))


def _top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keeps each row's most probable tokens up to the one that reaches top_p."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    beyond[:, 0] = False
    ordered.masked_fill_(beyond, 0.0)
    return torch.empty_like(probabilities).scatter_(1, order, ordered)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) a row, by hashing (seed, position) with splitmix64's finalizer."""
    state = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
    state = _mix(state + _GOLDEN) + np.array(positions, dtype=np.uint64) * _GOLDEN
    # 24 bits are what a float32 in [0, 1) holds exactly.
    return (_mix(state) >> np.uint64(40)).astype(np.float64) / 2**24


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _logprobs(
    logits: torch.Tensor, tokens: list[int], draws: Sequence[Draw], rows: list[int]
) -> dict[int, TokenLogprobs]:
    logprobs = logits[rows].float().log_softmax(-1)
    mine = torch.tensor([[tokens[i]] for i in rows], device=logits.device)
    chosen = logprobs.gather(1, mine)[:, 0].tolist()
    counts = [min(draws[i].sampling.logprobs or 0, logits.shape[1]) for i in rows]
    top = logprobs.topk(max(counts))
    values, indices = top.values.tolist(), top.indices.tolist()
    return {
        i: TokenLogprobs(
            token=tokens[i],
            logprob=chosen[n],
            top=tuple(zip(indices[n][:count], values[n][:count], strict=True)),
        )
        for n, (i, count) in enumerate(zip(rows, counts, strict=True))
    }
