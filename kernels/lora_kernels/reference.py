"""The kernels' specification in plain torch: what a launch computes, row by row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class VocabularyDelta:
    """What an adapter changes of the embedding or the head.

    A is [rank, inputs] at `a_offset` and B is [outputs, rank] at `b_offset`. rank None: the weight
    [vocab, hidden] at `b_offset` replaces the base model's.
    """

    head: bool
    inputs: int
    outputs: int
    a_offset: int
    b_offset: int
    rank: int | None
    scale: float = 1.0

    @property
    def elements(self) -> int:
        if self.rank is None:
            return self.inputs * self.outputs
        return self.rank * (self.inputs + self.outputs)

    def moved(self, elements: int) -> "VocabularyDelta":
        a, b = self.a_offset + elements, self.b_offset + elements
        return replace(self, a_offset=a, b_offset=b)


class Directory:
    """Locates each slot's matrices in the arena. Its arrays are [slots, layers, projections].

    A is [rank, in] at `a_offset` and B is [out, rank] at `b_offset`, both row-major; offsets count
    elements of the arena. rank 0: the adapter does not change the projection. Each change of a
    slot increments `generation[slot]`, which invalidates copies of its weights.
    gain_offset: where DoRA's gains are, [2, out], of which the sum counts; 0: there are none.
    gained: the slots with gains. vocabulary: of the slots that change embedding or head.
    """

    def __init__(self, slots: int, layers: int, projections: int) -> None:
        size = (slots, layers, projections)
        self.a_offset: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.b_offset: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.rank: npt.NDArray[np.int32] = np.zeros(size, np.int32)
        self.scale: npt.NDArray[np.float32] = np.zeros(size, np.float32)
        self.gain_offset: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.generation: npt.NDArray[np.int64] = np.zeros(slots, np.int64)
        self.gained: set[int] = set()
        self.vocabulary: dict[int, tuple[VocabularyDelta, ...]] = {}

    def write(
        self,
        slot: int,
        start: int,
        a_offset: npt.NDArray[np.int64],
        b_offset: npt.NDArray[np.int64],
        rank: npt.NDArray[np.int32],
        scale: npt.NDArray[np.float32],
        gain_offset: npt.NDArray[np.int64] | None = None,
        vocabulary: Sequence[VocabularyDelta] = (),
    ) -> None:
        """Fills a slot. start: the image's first element in the arena; offsets count from it."""
        self.a_offset[slot] = a_offset + start
        self.b_offset[slot] = b_offset + start
        self.rank[slot] = rank
        self.scale[slot] = scale
        self.gain_offset[slot] = 0
        if gain_offset is not None:
            self.gained.add(slot)
            self.gain_offset[slot] = np.where(gain_offset, gain_offset + start, 0)
        if vocabulary:
            self.vocabulary[slot] = tuple(delta.moved(start) for delta in vocabulary)
        self.generation[slot] += 1

    def shift(self, slot: int, elements: int) -> None:
        self.a_offset[slot] += elements
        self.b_offset[slot] += elements
        self.gain_offset[slot] += np.where(self.gain_offset[slot], elements, 0)
        if slot in self.vocabulary:
            self.vocabulary[slot] = tuple(d.moved(elements) for d in self.vocabulary[slot])
        self.generation[slot] += 1

    def clear(self, slot: int) -> None:
        self.rank[slot] = 0
        self.gain_offset[slot] = 0
        self.gained.discard(slot)
        self.vocabulary.pop(slot, None)
        self.generation[slot] += 1


def lora(
    x: torch.Tensor,
    y: torch.Tensor,
    row_slots: Sequence[int],
    directory: Directory,
    arena: torch.Tensor,
    layer: int,
    group: Sequence[tuple[int, int]],
) -> None:
    """Adds every row's delta to `y` in place, before the bias, and multiplies by its gain.

    x: [rows, in]. y: [rows, sum of the group's outputs]. group: (index, outputs) of each
    projection, in the order of the outputs in y.
    """
    for row, slot in enumerate(row_slots):
        start = 0
        for projection, outputs in group:
            rank = int(directory.rank[slot, layer, projection])
            if rank:
                a, b = matrices(directory, arena, slot, layer, projection, x.shape[1], outputs)
                shrunk = a.float() @ x[row].float()
                delta = b.float() @ shrunk * float(directory.scale[slot, layer, projection])
                own = y[row, start : start + outputs]
                gain = gains(directory, arena, slot, layer, projection, outputs)
                if gain is None:
                    own += delta.to(y.dtype)
                else:
                    own.copy_((own.float() + delta) * gain.float().sum(0))
            start += outputs


def matrices(
    directory: Directory,
    arena: torch.Tensor,
    slot: int,
    layer: int,
    projection: int,
    inputs: int,
    outputs: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of A [rank, in] and B [out, rank] in the arena."""
    rank = int(directory.rank[slot, layer, projection])
    a = int(directory.a_offset[slot, layer, projection])
    b = int(directory.b_offset[slot, layer, projection])
    return (
        arena[a : a + rank * inputs].view(rank, inputs),
        arena[b : b + rank * outputs].view(outputs, rank),
    )


def gains(
    directory: Directory,
    arena: torch.Tensor,
    slot: int,
    layer: int,
    projection: int,
    outputs: int,
) -> torch.Tensor | None:
    """A view of the gains in the arena, [2, out]."""
    start = int(directory.gain_offset[slot, layer, projection])
    return arena[start : start + 2 * outputs].view(2, outputs) if start else None


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention over paged keys and values. A row's queries are its last tokens.

    q: [tokens, heads, head_dim]; row r's queries are starts[r] to starts[r + 1]. keys, values:
    [pages, kv_heads, page_tokens, head_dim]. table: [rows, pages_max]. lengths: each row's number
    of keys, including those of its queries. window: how many tokens a token attends to, itself
    included. A query without keys gives zeros.
    """
    out = torch.zeros_like(q)
    kv_heads, page_tokens, head_dim = keys.shape[1:]
    for row, length in enumerate(lengths.tolist()):
        begin, end = starts[row : row + 2].tolist()
        pages = table[row, : -(-length // page_tokens)].long()
        # [kv_heads, keys, head_dim]
        k, v = (side[pages].transpose(0, 1).flatten(1, 2)[:, :length] for side in (keys, values))
        own = q[begin:end].reshape(end - begin, kv_heads, q.shape[1] // kv_heads, head_dim)
        scores = torch.einsum("qhgd,hkd->hgqk", own.float(), k.float()) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        distance = position - torch.arange(length, device=q.device)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        mixed = torch.einsum("hgqk,hkd->qhgd", weights, v.float())
        out[begin:end] = mixed.flatten(1, 2).to(q.dtype)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., hidden]. Computes in float32 and rounds once, to x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: float = 1.0,
) -> torch.Tensor:
    """Adds x · scale to `residual` in place and returns the norm of the sum."""
    residual.copy_(residual.float() + x.float() * scale)
    return rms_norm(residual, weight, eps)


def rotary_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    targets: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotates the queries in `qkv` in place; writes the rotated keys and the values to the cache.

    qkv: [tokens, heads + 2 · kv_heads, head_dim]. positions: [tokens]. targets: [tokens], each
    page · page_tokens + offset. cos, sin: [context, head_dim], sin with its first half negated.
    keys, values: [pages, kv_heads, page_tokens, head_dim]. query_norm, key_norm: weights of an RMS
    norm over head_dim before the rotation.
    """
    kv_heads, page_tokens = keys.shape[1], keys.shape[2]
    queries, own_keys = qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads]
    if query_norm is not None and key_norm is not None:
        queries.copy_(rms_norm(queries, query_norm, eps))
        own_keys = rms_norm(own_keys, key_norm, eps)
    queries.copy_(_rotated(queries, cos[positions], sin[positions]))
    pages, offsets = targets // page_tokens, targets % page_tokens
    keys[pages, :, offsets] = _rotated(own_keys, cos[positions], sin[positions])
    values[pages, :, offsets] = qkv[:, -kv_heads:]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [tokens, heads, head_dim]. Computes in float32 and rounds once."""
    wide, across = x.float(), x.roll(x.shape[-1] // 2, -1).float()
    return (wide * cos[:, None].float() + across * sin[:, None].float()).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2 · inner], gate then up → [rows, inner]. Computes in float32 and rounds once."""
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul`, by GELU in its approximation with tanh."""
    gate, up = gate_up.float().chunk(2, -1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    # (1 + tanh) / 2, without its cancellation.
    return (gate * (2 * inner).sigmoid() * up).to(gate_up.dtype)


def choose(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Samples a token for each row: int64 [rows, 2], the token and whether the logits are finite.

    Where temperature [rows] is 0: the first token with the largest logit. Elsewhere: the token
    whose interval of the cumulative softmax(logits / temperature) contains `uniform` [rows].
    """
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None]
    sums = (logits.float() / divisor).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    most, greedy = logits.max(-1)
    tokens = torch.where(temperature > 0, drawn.clamp(max=logits.shape[1] - 1), greedy)
    return torch.stack((tokens, most.isfinite().long()), -1)
