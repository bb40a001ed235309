"""What a request's parameters do to its logits before a token is sampled.

In vLLM's order: grammar, allowed tokens, bad words, minimum length, bias, penalties.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from replica.model.launch import Row
from replica.scheduling.request import Sampling


@dataclass(frozen=True, slots=True)
class Draw:
    """Parameters for sampling one token. position: of the sampled token.

    generated: tokens generated so far. Below `sampling.min_tokens` no stop token may be sampled.
    prompt, output: the tokens before it, if the sampling looks back. carried: the last of them is
    not in `output`: the previous launch samples it. mask: int32 [ceil(vocab / 32)], a bit for each
    token that the grammar allows.
    """

    sampling: Sampling
    seed: int
    position: int
    generated: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    carried: bool = False
    mask: NDArray[np.int32] | None = None


def draw_of(row: Row) -> Draw | None:
    """The draw for the token after the row's own, or None if the row does not sample."""
    if row.sampling is None:
        return None
    prompt, output = row.past or ((), ())
    return Draw(
        row.sampling,
        row.seed,
        row.position + len(row.tokens),
        row.generated,
        prompt,
        output,
        row.carry is not None,
        row.mask,
    )


@dataclass(frozen=True, slots=True)
class Penalties:
    """rows: [n], which rows pay; the pairs' first index refers to them. seen: (row, token) of
    prompts and outputs. counted: (row, token) of outputs. carried: rows whose last token comes from
    the previous launch. repetition, presence, frequency: float32 [n, 1].
    """

    rows: torch.Tensor
    seen: tuple[torch.Tensor, torch.Tensor]
    counted: tuple[torch.Tensor, torch.Tensor]
    carried: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor

    def apply(self, logits: torch.Tensor, previous: torch.Tensor | None) -> None:
        counts = logits.new_zeros((len(self.rows), logits.shape[1]))
        one = counts.new_ones(())
        seen = counts.index_put(self.seen, one)
        counts.index_put_(self.counted, one, accumulate=True)
        if len(self.carried):
            assert previous is not None
            last = self.carried, previous[self.rows[self.carried]]
            seen.index_put_(last, one)
            counts.index_put_(last, one, accumulate=True)
        own = logits[self.rows]
        scaled = torch.where(own > 0, own / self.repetition, own * self.repetition)
        own = torch.where(seen > 0, scaled, own)
        logits[self.rows] = own - self.frequency * counts - self.presence * (counts > 0)


@dataclass(frozen=True, slots=True)
class LogitRules:
    """On the device before the logits are. Each is None if no row needs it.

    masks: rows [n], and int32 [n, ceil(vocab / 32)] with a bit for each token that may come next.
    allowed: rows [n], and (row, token) pairs whose first index refers to these rows.
    added: rows, tokens, and what to add. ifs: rows, tokens that a row must not sample if its last
    token is the third.
    """

    masks: tuple[torch.Tensor, torch.Tensor] | None
    allowed: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None
    added: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    ifs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    penalties: Penalties | None

    def apply(self, logits: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """New logits, float32. previous: int64 [rows], the tokens that the previous launch sampled
        for rows with `carried`.
        """
        logits = logits.to(torch.float32, copy=True)
        if self.masks is not None:
            rows, words = self.masks
            bits = words[:, :, None] >> torch.arange(32, device=words.device) & 1
            barred = bits.flatten(1)[:, : logits.shape[1]] == 0
            logits[rows] = logits[rows].masked_fill(barred, float("-inf"))
        if self.allowed is not None:
            rows, pairs = self.allowed
            own = logits[rows]
            kept = torch.full_like(own, float("-inf"))
            kept[pairs] = own[pairs]
            logits[rows] = kept
        if self.added is not None:
            rows, tokens, values = self.added
            logits.index_put_((rows, tokens), values, accumulate=True)
        if self.ifs is not None:
            assert previous is not None
            rows, tokens, last = self.ifs
            barred = logits.new_zeros(len(rows))
            barred.masked_fill_(previous[rows] == last, float("-inf"))
            logits.index_put_((rows, tokens), barred, accumulate=True)
        if self.penalties is not None:
            self.penalties.apply(logits, previous)
        return logits


def rules_of(
    draws: Sequence[Draw], eos_tokens: frozenset[int], vocab: int, device: torch.device
) -> LogitRules | None:
    """None if all logits stay as they are."""
    added: list[tuple[int, int, float]] = []
    ifs: list[tuple[int, int, int]] = []
    for row, draw in enumerate(draws):
        sampling = draw.sampling
        if draw.generated < sampling.min_tokens and draw.mask is None:
            stops = eos_tokens | sampling.stop_tokens
            added += [(row, token, -np.inf) for token in sorted(stops) if token < vocab]
        if not sampling.adjusts:
            continue
        added += [(row, token, bias) for token, bias in sampling.logit_bias]
        for *first, last in sampling.bad_words:
            if not first:
                added.append((row, last, -np.inf))
            elif draw.carried and _ends(draw, first[:-1]):
                ifs.append((row, last, first[-1]))
            elif not draw.carried and _ends(draw, first):
                added.append((row, last, -np.inf))
    allowed = [row for row, draw in enumerate(draws) if draw.sampling.allowed_tokens is not None]
    paying = [row for row, draw in enumerate(draws) if draw.sampling.penalizes]
    masked = [(row, draw.mask) for row, draw in enumerate(draws) if draw.mask is not None]
    if not (added or ifs or allowed or paying or masked):
        return None
    return LogitRules(
        masks=_masks(masked, device) if masked else None,
        allowed=_allowed(draws, allowed, device) if allowed else None,
        added=_triples(added, np.float32, device) if added else None,
        ifs=_triples(ifs, np.int64, device) if ifs else None,
        penalties=_penalties(draws, paying, device) if paying else None,
    )


def _masks(
    masked: Sequence[tuple[int, NDArray[np.int32]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, masks = zip(*masked, strict=True)
    return to_device(rows, np.int64, device), to_device(np.stack(masks), np.int32, device)


def _ends(draw: Draw, tokens: Sequence[int]) -> bool:
    """The known tokens of prompt and output end with these."""
    if not tokens:
        return True
    count = len(tokens)
    known = list(draw.output[-count:])
    if len(known) < count:
        known = [*draw.prompt[len(known) - count :], *known]
    return known == list(tokens)


def _allowed(
    draws: Sequence[Draw], rows: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    tokens = [draws[row].sampling.allowed_tokens or () for row in rows]
    return to_device(rows, np.int64, device), _pairs(tokens, device)


def _penalties(draws: Sequence[Draw], rows: Sequence[int], device: torch.device) -> Penalties:
    paying = [draws[row] for row in rows]

    def column(values: Iterable[float]) -> torch.Tensor:
        return to_device(list(values), np.float32, device)[:, None]

    return Penalties(
        rows=to_device(rows, np.int64, device),
        seen=_pairs([[*draw.prompt, *draw.output] for draw in paying], device),
        counted=_pairs([draw.output for draw in paying], device),
        carried=to_device([i for i, d in enumerate(paying) if d.carried], np.int64, device),
        repetition=column(draw.sampling.repetition_penalty for draw in paying),
        presence=column(draw.sampling.presence_penalty for draw in paying),
        frequency=column(draw.sampling.frequency_penalty for draw in paying),
    )


def _pairs(
    tokens: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of the list, token) of each token, one transfer for both."""
    owners = np.repeat(np.arange(len(tokens)), [len(each) for each in tokens])
    flat = np.concatenate([np.asarray(each, dtype=np.int64) for each in tokens])
    own, token = to_device(np.stack((owners, flat)), np.int64, device)
    return own, token


def _triples(
    triples: Sequence[tuple[int, int, float]], third: type[np.generic], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, tokens, values = zip(*triples, strict=True)
    pair = to_device(np.array((rows, tokens)), np.int64, device)
    return pair[0], pair[1], to_device(values, third, device)


def to_device(
    values: Sequence[float] | NDArray[np.generic], dtype: type[np.generic], device: torch.device
) -> torch.Tensor:
    """On CUDA it copies from page-locked memory, because any other copy waits for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
