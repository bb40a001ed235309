"""The transformer over one packed batch of prefill chunks and decode rows, KV in pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from replica.shape import ModelShape
from replica.weights import Layer, Weights


class Deltas(Protocol):
    """What adapters add to a group's output, in place and before the bias (`lora_kernels.ops`)."""

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...


Masks = Mapping[int | None, torch.Tensor]
"""Added to attention scores: window → [rows, 1, queries, keys], 0 where seen and -inf elsewhere."""


@dataclass(frozen=True, slots=True)
class Span:
    """Sequences that attend together: `rows` of them with `queries` tokens each, next to each
    other in the batch from token `start` on.

    pages: [rows, pages], padded with the empty page.
    """

    start: int
    rows: int
    queries: int
    pages: torch.Tensor
    masks: Masks


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens, positions: [tokens]. targets: [tokens], where in the cache each one's keys and
    values go (page · page_tokens + offset). fresh: pages that get their first token now.
    wanted: [outputs], tokens whose logits are asked for.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    fresh: torch.Tensor
    spans: Sequence[Span]
    wanted: torch.Tensor


class Decoder:
    """cache: [layers, pages + 1, page_tokens, 2, kv_heads, head_dim]; the last page stays empty."""

    def __init__(
        self, shape: ModelShape, weights: Weights, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._cos, self._sin = cos_sin

    def forward(self, batch: Batch, cache: torch.Tensor, deltas: Deltas | None) -> torch.Tensor:
        """Logits [outputs, vocab]. deltas: None when every row is the base model's."""
        weights = self._weights
        # What a page's former owner left behind is masked, but 0 · NaN is not 0.
        cache.index_fill_(1, batch.fresh, 0)
        cos = self._cos.index_select(0, batch.positions)[:, None]
        sin = self._sin.index_select(0, batch.positions)[:, None]
        hidden = F.embedding(batch.tokens, weights.embeddings)
        for index, layer in enumerate(weights.layers):
            x = self._norm(hidden, layer.attention_norm)
            x = self._attend(x, index, layer, batch, cache[index], (cos, sin), deltas)
            hidden += x
            x = self._norm(hidden, layer.mlp_norm)
            gate_up = _project(x, index, 2, layer, deltas)
            gate, up = gate_up.tensor_split(2, -1)
            x = F.silu(gate).mul_(up)
            hidden += _project(x, index, 3, layer, deltas)
        hidden = hidden.index_select(0, batch.wanted)
        return F.linear(self._norm(hidden, weights.norm), weights.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._shape.norm_eps)

    def _attend(
        self,
        x: torch.Tensor,
        index: int,
        layer: Layer,
        batch: Batch,
        cache: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        deltas: Deltas | None,
    ) -> torch.Tensor:
        shape = self._shape
        qkv = _project(x, index, 0, layer, deltas).view(len(x), -1, shape.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, : shape.heads], qkv[:, shape.heads : -shape.kv_heads]
            queries.copy_(self._norm(queries, layer.query_norm))
            keys.copy_(self._norm(keys, layer.key_norm))
        turned = qkv[:, : -shape.kv_heads]
        turned.copy_(_rotate(turned, *cos_sin))
        new = qkv[:, shape.heads :].reshape(len(qkv), 2, shape.kv_heads, shape.head_dim)
        cache.flatten(0, 1).index_copy_(0, batch.targets, new)
        queries = qkv[:, : shape.heads]
        window = shape.windows[index]
        parts = [self._attend_span(queries, span, cache, window) for span in batch.spans]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _project(mixed, index, 1, layer, deltas)

    def _attend_span(
        self, queries: torch.Tensor, span: Span, cache: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        shape = self._shape
        group = shape.heads // shape.kv_heads
        tokens = span.rows * span.queries
        q = queries[span.start : span.start + tokens]
        q = q.view(span.rows, span.queries, shape.kv_heads, group, shape.head_dim)
        # A KV head's queries side by side: one query a head is slow on a CPU.
        q = q.permute(0, 2, 1, 3, 4).flatten(2, 3)
        kv = cache.index_select(0, span.pages.flatten())
        kv = kv.view(span.rows, -1, 2, shape.kv_heads, shape.head_dim).permute(2, 0, 3, 1, 4)
        mask = span.masks[window].repeat_interleave(group, 2)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        mixed = mixed.view(span.rows, shape.kv_heads, span.queries, group, shape.head_dim)
        mixed = mixed.transpose(1, 2)
        return mixed.reshape(tokens, shape.heads * shape.head_dim)


def _project(
    x: torch.Tensor, index: int, group: int, layer: Layer, deltas: Deltas | None
) -> torch.Tensor:
    bias = layer.biases[group]
    if deltas is None:
        return F.linear(x, layer.matmuls[group], bias)
    y = F.linear(x, layer.matmuls[group])
    deltas.add(x, y, index, group)
    return y if bias is None else y.add_(bias)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [tokens, heads, head_dim]. sin's first half is negative already."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotary_tables(
    shape: ModelShape, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [tokens, head_dim] each, sin with its first half negated (see `_rotate`)."""
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
