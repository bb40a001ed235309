"""Logits → tokens and logprobs. The random number of a token depends only on (seed, position).

Three parts, so that a GPU need not wait: `prepare` sends the sampling parameters to the device
ahead, `choose` samples there, and `read` reads the tokens when they are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from replica.model.logit_rules import Draw, LogitRules, rules_of, to_device
from replica.scheduling.request import Sampled, Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows that torch operations sample. All tensors are on the logits' device.

    rows: their indices in the logits; the other indices refer to `rows`. temperature, uniform:
    [rows, 1]. floor: [rows, 1], the logarithm of min-p; None if no row has it. limited: rows with
    top-k. limit_max: their largest k. bound: [limited, 1], k − 1. narrow: rows with top-p. top_p:
    [narrow, 1].
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor
    floor: torch.Tensor | None
    limited: torch.Tensor | None
    limit_max: int
    bound: torch.Tensor
    narrow: torch.Tensor | None
    top_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """Sampling parameters of one step, on the device before the logits are.

    rules: what changes logits; None if nothing does.
    temperature_uniform: float32 [2, rows], temperatures and random numbers in [0, 1), for the
    kernel that samples all rows; None if torch operations sample.
    drawn: rows with a temperature that torch operations sample. With the kernel, only those with
    top-k, top-p or min-p.
    reported: rows that report logprobs. logprobs_max: most tokens that one of them reports.
    """

    rules: LogitRules | None
    temperature_uniform: torch.Tensor | None
    drawn: Drawn | None
    reported: torch.Tensor | None
    logprobs_max: int


# The logits are not finite; all is well; no token is allowed → Sampled's `finite` and `allowed`.
_STATES = {0: (False, True), 1: (True, True), 2: (True, False)}


@dataclass(frozen=True, slots=True)
class Choice:
    """tokens: int64 [rows, 2], the token, and a key of `_STATES`. logprobs:
    for rows that report, the token's logprob [reported, 1], the largest logprobs, and their tokens,
    [reported, logprobs_max] each.
    """

    tokens: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def to_host(self) -> "Choice":
        """An asynchronous copy in page-locked memory. Record an event after it, and wait for the
        event before `read`. On a CPU the result shares the tensors.
        """
        tokens = self.tokens.to("cpu", non_blocking=True)
        if self.logprobs is None:
            return Choice(tokens, None)
        chosen, top, top_tokens = (t.to("cpu", non_blocking=True) for t in self.logprobs)
        return Choice(tokens, (chosen, top, top_tokens))


def sample(
    logits: torch.Tensor, draws: Sequence[Draw], eos_tokens: frozenset[int]
) -> list[Sampled]:
    """Samples one token per row of logits [rows, vocab]: rules, temperature, min-p, top-k, top-p,
    draw.

    Logprobs are those of the unmodified logits.
    """
    metadata = prepare(draws, eos_tokens, logits.shape[1], logits.device)
    return read(choose(logits, metadata), draws)


def prepare(
    draws: Sequence[Draw],
    eos_tokens: frozenset[int],
    vocab: int,
    device: torch.device,
    kernel: bool | None = None,
) -> SamplingMetadata:
    """kernel: sample with `lora_kernels.fused`; None: on CUDA only."""
    if kernel is None:
        kernel = device.type == "cuda"
    rows = [
        row
        for row, draw in enumerate(draws)
        if draw.sampling.temperature > 0 and (not kernel or narrows(draw.sampling, vocab))
    ]
    reported = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    counts = [draws[row].sampling.logprobs or 0 for row in reported]
    both = [[draw.sampling.temperature for draw in draws], _uniforms_of(draws)] if kernel else None
    return SamplingMetadata(
        rules=rules_of(draws, eos_tokens, vocab, device),
        temperature_uniform=None if both is None else to_device(np.array(both), np.float32, device),
        drawn=_drawn([draws[row] for row in rows], rows, vocab, device) if rows else None,
        reported=to_device(reported, np.int64, device) if reported else None,
        logprobs_max=min(max(counts, default=0), vocab),
    )


def _drawn(draws: Sequence[Draw], rows: list[int], vocab: int, device: torch.device) -> Drawn:
    limited = [i for i, d in enumerate(draws) if 0 < d.sampling.top_k < vocab]
    counts = [draws[i].sampling.top_k for i in limited]
    narrow = [i for i, d in enumerate(draws) if d.sampling.top_p < 1]
    floors = [d.sampling.min_p for d in draws]

    def column(values: Sequence[float] | NDArray[np.float64]) -> torch.Tensor:
        return to_device(values, np.float32, device)[:, None]

    return Drawn(
        rows=to_device(rows, np.int64, device),
        temperature=column([d.sampling.temperature for d in draws]),
        uniform=column(_uniforms_of(draws)),
        floor=column(floors).log() if any(floors) else None,
        limited=to_device(limited, np.int64, device) if limited else None,
        limit_max=max(counts, default=0),
        bound=to_device([count - 1 for count in counts], np.int64, device)[:, None],
        narrow=to_device(narrow, np.int64, device) if narrow else None,
        top_p=column([draws[i].sampling.top_p for i in narrow]),
    )


def choose(
    logits: torch.Tensor, metadata: SamplingMetadata, previous: torch.Tensor | None = None
) -> Choice:
    """Samples without waiting: on CUDA all work goes to the current stream.

    previous: int64 [rows], what the previous launch sampled for draws with `carried`.
    """
    raw = logits
    if metadata.rules is not None:
        logits = metadata.rules.apply(logits, previous)
    if metadata.temperature_uniform is None:
        # The first maximum, like `argmax`, which takes four times as long on a CPU. NaN is one.
        most, first = logits.max(-1)
        tokens = torch.stack((first, most.isfinite().long()), -1)
        if metadata.drawn is not None:
            probabilities = _probabilities(logits, metadata.drawn)
            tokens[metadata.drawn.rows, 0] = pick(probabilities, metadata.drawn.uniform)
    else:
        from lora_kernels import fused

        tokens = fused.choose(logits, *metadata.temperature_uniform)
        if metadata.drawn is not None:
            kept = _probabilities(logits, metadata.drawn).log()
            uniform = metadata.drawn.uniform[:, 0]
            tokens[metadata.drawn.rows] = fused.choose(kept, torch.ones_like(uniform), uniform)
    if metadata.rules is not None:
        # Finite before the rules, but not after them.
        emptied = (tokens[:, 1] == 0) & raw.amax(-1).isfinite()
        tokens[:, 1].masked_fill_(emptied, 2)
    return Choice(
        tokens, None if metadata.reported is None else _logprobs(raw, tokens[:, 0], metadata)
    )


def read(choice: Choice, draws: Sequence[Draw]) -> list[Sampled]:
    """Reads the tokens and logprobs. draws: the ones given to `prepare`."""
    tokens = choice.tokens.tolist()
    if choice.logprobs is None:
        return [Sampled(token, None, *_STATES[state]) for token, state in tokens]
    chosen, values, indices = (t.tolist() for t in choice.logprobs)
    sampled = []
    reported = 0
    for (token, state), draw in zip(tokens, draws, strict=True):
        count = draw.sampling.logprobs
        if count is None:
            sampled.append(Sampled(token, None, *_STATES[state]))
            continue
        pairs = zip(indices[reported][:count], values[reported][:count], strict=True)
        logprobs = TokenLogprobs(token, logprob=chosen[reported][0], top=tuple(pairs))
        sampled.append(Sampled(token, logprobs, *_STATES[state]))
        reported += 1
    return sampled


def _probabilities(logits: torch.Tensor, drawn: Drawn) -> torch.Tensor:
    """[drawn.rows, vocab], 0 outside min-p, top-k and top-p. Rows need not sum to 1."""
    logits = logits[drawn.rows].float() / drawn.temperature
    if drawn.floor is not None:
        least = logits.amax(-1, keepdim=True) + drawn.floor
        logits = logits.masked_fill(logits < least, float("-inf"))
    if drawn.limited is not None:
        logits = _top_k(logits, drawn.limited, drawn.limit_max, drawn.bound)
    probabilities = logits.softmax(-1)
    if drawn.narrow is not None:
        probabilities[drawn.narrow] = _top_p(probabilities[drawn.narrow], drawn.top_p)
    return probabilities


def narrows(sampling: Sampling, vocab: int) -> bool:
    return 0 < sampling.top_k < vocab or sampling.top_p < 1 or sampling.min_p > 0


def pick(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Samples by inverting the cumulative sum at `uniform` [rows, 1]. It never picks a token of
    probability 0.
    """
    sums = probabilities.cumsum(-1)
    # uniform has 24 bits, so uniform · total < total in float32 and the index is in range.
    target = uniform * sums[:, -1:]
    # clamp: a row with values that are not finite may give any valid token.
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp_(max=sums.shape[1] - 1)


def _top_k(
    logits: torch.Tensor, limited: torch.Tensor, limit_max: int, bound: torch.Tensor
) -> torch.Tensor:
    """Keeps the k largest logits of each limited row, and those equal to the k-th."""
    last = logits[limited].topk(limit_max).values.gather(1, bound)
    least = torch.full_like(logits[:, :1], float("-inf"))
    least[limited] = last
    return logits.masked_fill(logits < least, float("-inf"))


def _top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keeps each row's most probable tokens up to the one at which their sum reaches top_p."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    beyond[:, 0] = False
    ordered.masked_fill_(beyond, 0.0)
    return torch.empty_like(probabilities).scatter_(1, order, ordered)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) per row: a hash of (seed, position) by splitmix64's finalizer."""
    state = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
    state = _mix(state + _GOLDEN) + np.array(positions, dtype=np.uint64) * _GOLDEN
    # A float32 in [0, 1) represents 24 bits exactly.
    return (_mix(state) >> np.uint64(40)).astype(np.float64) / 2**24


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _uniforms_of(draws: Sequence[Draw]) -> NDArray[np.float64]:
    return uniforms([draw.seed for draw in draws], [draw.position for draw in draws])


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, metadata: SamplingMetadata
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert metadata.reported is not None
    logprobs = logits[metadata.reported].float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens[metadata.reported][:, None])
    top = logprobs.topk(metadata.logprobs_max)
    return chosen, top.values, top.indices
