"""Attention over paged keys and values in torch operations: it gathers each sequence's pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Queries whose scores are in memory at once, where the fused kernel cannot compute them.
_QUERIES_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Span:
    """Sequences that attend in one operation: `rows` of them with `queries` tokens each,
    consecutive in the batch from token `start`. A span with more than one query has one row.

    pages: [2 · kv_heads · rows · pages], indices into a layer's cache viewed as
    [2 · kv_heads · (pages + 1), page_tokens · head_dim]. Rows are padded with the empty page.
    masks: window → [rows, queries, keys], added to the scores: 0 for visible keys, else -inf.
    """

    start: int
    rows: int
    queries: int
    pages: torch.Tensor
    masks: Mapping[int | None, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """tokens, positions: [tokens]. targets: [tokens], where a token's keys and values are stored
    (page · page_tokens + offset). fresh: pages that get their first token in this step.
    wanted: [outputs], tokens whose logits are computed.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    fresh: torch.Tensor
    spans: Sequence[Span]
    wanted: torch.Tensor


class GatherAttention:
    """Stores the keys and values of one batch at a time, and attends: `begin`, then `attend` for
    each layer.

    cache: [layers, 2, kv_heads, pages + 1, page_tokens, head_dim]. The last page stays empty. Heads
    come before pages, so that the result of `index_select` fits one `bmm` over rows and heads.
    A layer may have fewer KV heads, or smaller ones, than the cache.
    """

    def __init__(self, cache: torch.Tensor) -> None:
        self._cache = cache
        self._pages = [layer.view(-1, layer[0, 0, 0].numel()) for layer in cache]
        self._slots = [layer.flatten(2, 3) for layer in cache]
        self._kv_heads, self._size = cache.shape[2], cache.shape[5]

    def begin(self, batch: ModelInputs) -> None:
        # Old values in a page are masked, but 0 · NaN is NaN.
        self._cache.index_fill_(3, batch.fresh, 0)
        self._targets, self._spans = batch.targets, batch.spans
        # One buffer for all layers: allocating one per layer costs as much as the copy.
        width = self._pages[0].shape[1]
        self._gathered = [self._cache.new_empty(len(span.pages), width) for span in batch.spans]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """[tokens, heads, size of a value]. q, keys, values: [tokens, heads or kv_heads, size]."""
        self.store(layer, keys, values)
        parts = [
            self._mix(layer, q, span, keys.shape[1], scale, window, softcap, into)
            for span, into in zip(self._spans, self._gathered, strict=True)
        ]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mixed if values.shape[2] == self._size else mixed[..., : values.shape[2]]

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for slots, new in zip(self._slots[layer], (keys, values), strict=True):
            target = slots[: new.shape[1], :, : new.shape[2]]
            target.index_copy_(1, self._targets, new.transpose(0, 1))

    def _mix(
        self,
        layer: int,
        q: torch.Tensor,
        span: Span,
        kv_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        gathered: torch.Tensor,
    ) -> torch.Tensor:
        """[tokens of the span, heads, size]. gathered: buffer for the span's pages."""
        tokens, queries, heads = span.rows * span.queries, span.queries, q.shape[1]
        torch.index_select(self._pages[layer], 0, span.pages, out=gathered)
        both = gathered.view(2, self._kv_heads, span.rows, -1, self._size)
        keys, values = both[:, :kv_heads].flatten(1, 2)
        keys = keys[..., : q.shape[2]]
        group = heads // kv_heads
        q = q[span.start : span.start + tokens].view(tokens, kv_heads, group, -1)
        mask = span.masks[window]
        if queries == 1:
            q = q.transpose(0, 1).reshape(-1, group, q.shape[3])
            mixed = _mix_few(q, keys, values, mask, kv_heads, scale, softcap)
            return mixed.view(kv_heads, tokens, group, -1).transpose(0, 1).flatten(1, 2)
        # Heads that share a KV head form the batch dimension: each uses the same keys.
        q = q.permute(2, 1, 0, 3)
        if softcap is None:
            mixed = F.scaled_dot_product_attention(
                q,
                keys.expand(group, -1, -1, -1),
                values.expand(group, -1, -1, -1),
                attn_mask=mask,
                scale=scale,
            )
        else:
            pieces = torch.split(q, _QUERIES_AT_ONCE, 2)
            masks = torch.split(mask[0], _QUERIES_AT_ONCE)
            mixed = torch.cat(
                [
                    _mix_capped(q, mask, keys, values, scale, softcap)
                    for q, mask in zip(pieces, masks, strict=True)
                ],
                2,
            )
        return mixed.permute(2, 1, 0, 3).flatten(1, 2)


def _mix_few(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    kv_heads: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Two matmuls. With few queries per KV head they are far faster than the CPU's fused kernel.

    q: [kv_heads · rows, group, size], mask: [rows, 1, keys].
    """
    scores = torch.bmm(q, keys.transpose(1, 2)).float().mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    by_head = scores.view(kv_heads, -1, *scores.shape[1:])
    by_head += mask
    return torch.bmm(scores.softmax(-1).to(q.dtype), values)


def _mix_capped(
    q: torch.Tensor,
    mask: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """q: [group, kv_heads, queries, size], mask: [queries, keys]."""
    scores = (q @ keys.transpose(1, 2)).float().mul_(scale)
    scores.div_(softcap).tanh_().mul_(softcap).add_(mask)
    return scores.softmax(-1).to(q.dtype) @ values
