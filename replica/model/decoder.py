"""The transformer over one packed batch of prefill chunks and decode rows, in torch operations.
Keys and values are in pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from replica.model.shape import ModelShape
from replica.model.weights import Layer, Weights


class Deltas(Protocol):
    """Adds the adapters' deltas to a group's output, in place and before the bias
    (`lora_kernels.ops`).

    `start` is called before the base matmul of x, so that work on x alone can overlap it.
    """

    def start(self, x: torch.Tensor, layer: int, group: int) -> None: ...

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...


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


class Decoder:
    """cache: [layers, 2, kv_heads, pages + 1, page_tokens, head_dim]. The last page stays empty.

    Heads come before pages, so that the result of `index_select` fits one `bmm` over rows and
    heads.
    """

    def __init__(
        self, shape: ModelShape, weights: Weights, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._cos, self._sin = cos_sin

    def forward(
        self, batch: ModelInputs, cache: torch.Tensor, deltas: Deltas | None
    ) -> torch.Tensor:
        """Logits [outputs, vocab]. deltas: None if all rows use the base model."""
        weights = self._weights
        # Old values in a page are masked, but 0 · NaN is NaN.
        cache.index_fill_(3, batch.fresh, 0)
        cos = self._cos.index_select(0, batch.positions)[:, None]
        sin = self._sin.index_select(0, batch.positions)[:, None]
        page_size = cache.shape[4] * cache.shape[5]
        # One buffer for all layers: allocating one per layer costs as much as the copy.
        gathered = [cache.new_empty(len(span.pages), page_size) for span in batch.spans]
        hidden = F.embedding(batch.tokens, weights.embeddings)
        for index, layer in enumerate(weights.layers):
            x = self._norm(hidden, layer.attention_norm)
            qkv = _project(x, index, 0, layer, deltas).view(len(x), -1, self._shape.head_dim)
            self._rotate_and_store(qkv, layer, (cos, sin), cache[index], batch.targets)
            parts = [
                self._attend(qkv, span, cache[index], self._shape.windows[index], into)
                for span, into in zip(batch.spans, gathered, strict=True)
            ]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            hidden += _project(x, index, 1, layer, deltas)
            x = self._norm(hidden, layer.mlp_norm)
            gate, up = _project(x, index, 2, layer, deltas).chunk(2, -1)
            hidden += _project(F.silu(gate).mul_(up), index, 3, layer, deltas)
        hidden = hidden.index_select(0, batch.wanted)
        return weights.head(self._norm(hidden, weights.norm))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._shape.norm_eps)

    def _rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: Layer,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Rotates queries and keys by their positions, in place, and stores keys and values."""
        heads, kv_heads = self._shape.heads, self._shape.kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, :heads], qkv[:, heads:-kv_heads]
            queries.copy_(self._norm(queries, layer.query_norm))
            keys.copy_(self._norm(keys, layer.key_norm))
        rotated = qkv[:, :-kv_heads]
        rotated.copy_(_rotate(rotated, *cos_sin))
        cache.flatten(2, 3).flatten(0, 1).index_copy_(1, targets, qkv[:, heads:].transpose(0, 1))

    def _attend(
        self,
        qkv: torch.Tensor,
        span: Span,
        cache: torch.Tensor,
        window: int | None,
        gathered: torch.Tensor,
    ) -> torch.Tensor:
        """[tokens of the span, heads · head_dim]. gathered: buffer for the span's pages."""
        kv_heads, size = self._shape.kv_heads, self._shape.head_dim
        group = self._shape.heads // kv_heads
        tokens, queries = span.rows * span.queries, span.queries
        torch.index_select(cache.view(-1, gathered.shape[1]), 0, span.pages, out=gathered)
        keys, values = gathered.view(2, kv_heads * span.rows, -1, size)
        q = qkv[span.start : span.start + tokens, : self._shape.heads]
        q = q.view(tokens, kv_heads, group, size)
        mask = span.masks[window]
        if queries == 1:
            q = q.transpose(0, 1).reshape(-1, group, size)
            mixed = _attend_short(q, keys, values, mask, kv_heads)
            return mixed.view(kv_heads, tokens, -1).transpose(0, 1).reshape(tokens, -1)
        # Heads that share a KV head form the batch dimension: each uses the same keys.
        mixed = F.scaled_dot_product_attention(
            q.permute(2, 1, 0, 3),
            keys.expand(group, -1, -1, -1),
            values.expand(group, -1, -1, -1),
            attn_mask=mask,
        )
        return mixed.permute(2, 1, 0, 3).reshape(tokens, -1)


def _attend_short(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, kv_heads: int
) -> torch.Tensor:
    """Two matmuls. With few queries per KV head they are far faster than the CPU's fused kernel.

    q: [kv_heads · rows, group, head_dim], mask: [rows, 1, keys].
    """
    scores = torch.bmm(q, keys.transpose(1, 2)).float().mul_(q.shape[-1] ** -0.5)
    by_head = scores.view(kv_heads, -1, *scores.shape[1:])
    by_head += mask
    return torch.bmm(scores.softmax(-1).to(q.dtype), values)


def _project(
    x: torch.Tensor, index: int, group: int, layer: Layer, deltas: Deltas | None
) -> torch.Tensor:
    if deltas is not None:
        deltas.start(x, index, group)
    y = layer.matmuls[group](x)
    if deltas is not None:
        deltas.add(x, y, index, group)
    return layer.complete(y, group)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [tokens, heads, head_dim]. The first half of sin is already negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotary_tables(
    shape: ModelShape, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [tokens, head_dim] each. The first half of sin is negated (see `_rotate`)."""
    frequencies, scale = _frequencies(shape)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return both[0].to(device, dtype), both[1].to(device, dtype)


def _frequencies(shape: ModelShape) -> tuple[torch.Tensor, float]:
    if shape.rope["rope_type"] == "default":
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return 1.0 / (shape.rope["rope_theta"] ** exponents), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model(
        shape.architecture,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters=dict(shape.rope),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[shape.rope["rope_type"]](config, "cpu")
    return frequencies, scale
