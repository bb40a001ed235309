"""Logits → tokens and logprobs; a draw depends on nothing but (seed, position).

In three parts, so that on a GPU nobody waits between them: what tokens are chosen by is prepared
and sent ahead (`prepare`), they are chosen on the device (`choose`), and read when needed (`read`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from replica.model.launch import Row
from replica.scheduling.request import Sampled, Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row's token is chosen by. position: of the token being drawn.

    generated: tokens generated so far; below `sampling.min_tokens` nothing may end the request.
    """

    sampling: Sampling
    seed: int
    position: int
    generated: int


def draw_of(row: Row) -> Draw | None:
    """What the token behind the row's own is chosen by, if one is wanted."""
    if row.sampling is None:
        return None
    return Draw(row.sampling, row.seed, row.position + len(row.tokens), row.generated)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows that torch's own operations draw for; all tensors lie on the logits' device.

    rows: which of the logits. temperature, uniform: [rows, 1]. limited, bound: the rows, of these,
    that keep the `limit_max` largest at most, and [limited, 1] the number of the last they keep.
    narrow, top_p: the rows, of these, that keep the most probable up to top_p [narrow, 1].
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor
    limited: torch.Tensor | None
    limit_max: int
    bound: torch.Tensor
    narrow: torch.Tensor | None
    top_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """What the tokens of one step are chosen by, on the device before the logits are there.

    barred: (rows, tokens), equally long, that must not be chosen.
    temperature_uniform: float32 [2, rows], temperatures and numbers in [0, 1), for the kernel that
    takes all rows in one launch; None where torch's own operations do.
    drawn: rows with a temperature; beside the kernel only those that top-k or top-p narrows.
    reported, logprobs_max: rows whose logprobs are asked for, and for how many tokens at most.
    """

    barred: tuple[torch.Tensor, torch.Tensor] | None
    temperature_uniform: torch.Tensor | None
    drawn: Drawn | None
    reported: torch.Tensor | None
    logprobs_max: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens of one step, int64 [rows], and of the rows that report: the logprob of the token
    [reported, 1], and the largest logprobs and their tokens, [reported, logprobs_max] each.
    """

    tokens: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def to_host(self) -> "Choice":
        """A copy into page-locked memory that does not wait: record an event after it, and `read`
        it when that has come. On a CPU it is this one.
        """
        tokens = self.tokens.to("cpu", non_blocking=True)
        if self.logprobs is None:
            return Choice(tokens, None)
        chosen, top, top_tokens = (t.to("cpu", non_blocking=True) for t in self.logprobs)
        return Choice(tokens, (chosen, top, top_tokens))


def sample(
    logits: torch.Tensor, draws: Sequence[Draw], eos_tokens: frozenset[int]
) -> list[Sampled]:
    """One token a row of logits [rows, vocab]: temperature, top-k, top-p, draw.

    Logprobs are of the logits as they come in, before any of these.
    """
    rules = prepare(draws, eos_tokens, logits.shape[1], logits.device)
    return read(choose(logits, rules), draws)


def prepare(
    draws: Sequence[Draw],
    eos_tokens: frozenset[int],
    vocab: int,
    device: torch.device,
    kernel: bool | None = None,
) -> SamplingMetadata:
    """kernel: whether `lora_kernels.fused` chooses; None: on CUDA."""
    if kernel is None:
        kernel = device.type == "cuda"
    barred = [
        (row, token)
        for row, draw in enumerate(draws)
        if draw.generated < draw.sampling.min_tokens
        for token in sorted(eos_tokens | draw.sampling.stop_tokens)
        if token < vocab
    ]
    rows = [
        row
        for row, draw in enumerate(draws)
        if draw.sampling.temperature > 0 and (not kernel or _narrows(draw.sampling, vocab))
    ]
    reported = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    counts = [draws[row].sampling.logprobs or 0 for row in reported]
    both = [[draw.sampling.temperature for draw in draws], _uniforms_of(draws)] if kernel else None
    return SamplingMetadata(
        barred=_pairs(barred, device) if barred else None,
        temperature_uniform=None if both is None else _tensor(np.array(both), np.float32, device),
        drawn=_drawn([draws[row] for row in rows], rows, vocab, device) if rows else None,
        reported=_tensor(reported, np.int64, device) if reported else None,
        logprobs_max=min(max(counts, default=0), vocab),
    )


def _drawn(draws: Sequence[Draw], rows: list[int], vocab: int, device: torch.device) -> Drawn:
    limited = [i for i, d in enumerate(draws) if 0 < d.sampling.top_k < vocab]
    counts = [draws[i].sampling.top_k for i in limited]
    narrow = [i for i, d in enumerate(draws) if d.sampling.top_p < 1]

    def column(values: Sequence[float] | NDArray[np.float64]) -> torch.Tensor:
        return _tensor(values, np.float32, device)[:, None]

    return Drawn(
        rows=_tensor(rows, np.int64, device),
        temperature=column([d.sampling.temperature for d in draws]),
        uniform=column(_uniforms_of(draws)),
        limited=_tensor(limited, np.int64, device) if limited else None,
        limit_max=max(counts, default=0),
        bound=_tensor([count - 1 for count in counts], np.int64, device)[:, None],
        narrow=_tensor(narrow, np.int64, device) if narrow else None,
        top_p=column([draws[i].sampling.top_p for i in narrow]),
    )


def choose(logits: torch.Tensor, rules: SamplingMetadata) -> Choice:
    """Waits for nothing: on CUDA all is put on the current stream."""
    raw = logits
    if rules.barred is not None:
        logits = logits.index_put(rules.barred, logits.new_full((), float("-inf")))
    if rules.temperature_uniform is None:
        # The first of the largest, as `argmax`, which takes four times as long on a CPU.
        tokens = logits.max(-1).indices
        if rules.drawn is not None:
            probabilities = _probabilities(logits, rules.drawn)
            tokens[rules.drawn.rows] = pick(probabilities, rules.drawn.uniform)
    else:
        from lora_kernels import fused

        tokens = fused.choose(logits, *rules.temperature_uniform)
        if rules.drawn is not None:
            kept = _probabilities(logits, rules.drawn).log()
            uniform = rules.drawn.uniform[:, 0]
            tokens[rules.drawn.rows] = fused.choose(kept, torch.ones_like(uniform), uniform)
    return Choice(tokens, None if rules.reported is None else _logprobs(raw, tokens, rules))


def read(choice: Choice, draws: Sequence[Draw]) -> list[Sampled]:
    """What was chosen, as values. draws: those that the rules were prepared from."""
    tokens = choice.tokens.tolist()
    if choice.logprobs is None:
        return [Sampled(token) for token in tokens]
    chosen, values, indices = (t.tolist() for t in choice.logprobs)
    sampled = []
    reported = 0
    for token, draw in zip(tokens, draws, strict=True):
        count = draw.sampling.logprobs
        if count is None:
            sampled.append(Sampled(token))
            continue
        pairs = zip(indices[reported][:count], values[reported][:count], strict=True)
        logprobs = TokenLogprobs(token, logprob=chosen[reported][0], top=tuple(pairs))
        sampled.append(Sampled(token, logprobs))
        reported += 1
    return sampled


def _probabilities(logits: torch.Tensor, drawn: Drawn) -> torch.Tensor:
    """[rows drawn for, vocab], 0 for what top-k and top-p leave out; they need not sum to 1."""
    logits = logits[drawn.rows].float() / drawn.temperature
    if drawn.limited is not None:
        logits = _top_k(logits, drawn.limited, drawn.limit_max, drawn.bound)
    probabilities = logits.softmax(-1)
    if drawn.narrow is not None:
        probabilities[drawn.narrow] = _top_p(probabilities[drawn.narrow], drawn.top_p)
    return probabilities


def _narrows(sampling: Sampling, vocab: int) -> bool:
    return 0 < sampling.top_k < vocab or sampling.top_p < 1


def pick(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token in whose share of the sum `uniform` [rows, 1] lies; never one of probability 0."""
    sums = probabilities.cumsum(-1)
    # With 24 bits, uniform · total < total in float32 too: the search ends before the end.
    target = uniform * sums[:, -1:]
    # But for a row that is not finite, which may give any token, as long as it is one.
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp_(max=sums.shape[1] - 1)


def _top_k(
    logits: torch.Tensor, limited: torch.Tensor, limit_max: int, bound: torch.Tensor
) -> torch.Tensor:
    """Keeps the k largest of each limited row. Equals of the k-th stay too."""
    last = logits[limited].topk(limit_max).values.gather(1, bound)
    least = torch.full_like(logits[:, :1], float("-inf"))
    least[limited] = last
    return logits.masked_fill(logits < least, float("-inf"))


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


def _uniforms_of(draws: Sequence[Draw]) -> NDArray[np.float64]:
    return uniforms([draw.seed for draw in draws], [draw.position for draw in draws])


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, rules: SamplingMetadata
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert rules.reported is not None
    logprobs = logits[rules.reported].float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens[rules.reported][:, None])
    top = logprobs.topk(rules.logprobs_max)
    return chosen, top.values, top.indices


def _pairs(
    pairs: Sequence[tuple[int, int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = _tensor(np.array(pairs).T, np.int64, device)
    return rows, tokens


def _tensor(
    values: Sequence[float] | NDArray[np.generic], dtype: type[np.generic], device: torch.device
) -> torch.Tensor:
    """On CUDA from page-locked memory, for a copy from any other waits for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
