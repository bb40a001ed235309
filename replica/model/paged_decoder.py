"""The transformer over one packed batch by kernels that find keys and values by page tables."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from lora_kernels import attention, fused
from replica.model.shape import ModelShape
from replica.model.weights import Layer, Weights


class PagedDeltas(Protocol):
    """What adapters add to a group's output. start: x is there, y is about to be computed."""

    def start(self, x: torch.Tensor, layer: int, group: int) -> None: ...

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Rows of one token first, `decodes` of them, then chunks; int32, on the device.

    tokens, positions: [tokens]. targets: [tokens], where each one's keys and values go (page ·
    page_tokens + offset). table: [rows, pages], which pages each row's keys lie in. lengths:
    [rows], how many keys those are, this step's included. starts: [chunks + 1], where each chunk
    begins among the tokens of chunks. longest: tokens of the longest chunk.
    wanted: [outputs], tokens whose logits are asked for; None: all.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    decodes: int
    starts: torch.Tensor
    longest: int
    wanted: torch.Tensor | None


def paged_cache(memory: torch.Tensor, shape: ModelShape, page_tokens: int) -> torch.Tensor:
    """Flat memory as pages, one behind another, for a `PagedDecoder`. It may hold anything."""
    size = (shape.layers, 2, shape.kv_heads, page_tokens, shape.head_dim)
    return memory.view(-1, *size)


class PagedDecoder:
    """cache: [pages + 1, layers, 2, kv_heads, page_tokens, head_dim]: a page is one piece of
    memory, whatever it holds. The last page is written to by rows that only fill up a batch.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        rows_max: int,
    ) -> None:
        """rows_max: the most rows of one token in a batch."""
        self._shape = shape
        self._weights = weights
        self._cos, self._sin = cos_sin
        self._keys = [cache[:, layer, 0] for layer in range(shape.layers)]
        self._values = [cache[:, layer, 1] for layer in range(shape.layers)]
        self._scratch = attention.decode_scratch(
            rows_max, shape.heads, shape.head_dim, cache.device
        )

    def forward(self, batch: PagedBatch, deltas: PagedDeltas | None) -> torch.Tensor:
        """Logits [outputs, vocab]. deltas: None when every row is the base model's."""
        weights, shape = self._weights, self._shape
        norms = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        hidden = F.embedding(batch.tokens, weights.embeddings)
        x = fused.rms_norm(hidden, weights.layers[0].attention_norm, shape.norm_eps)
        for index, (layer, next_norm) in enumerate(zip(weights.layers, norms, strict=True)):
            qkv = _project(x, index, 0, layer, deltas).view(len(x), -1, shape.head_dim)
            x = self._attend(qkv, index, layer, batch)
            x = _project(x, index, 1, layer, deltas)
            x = fused.add_rms_norm(x, hidden, layer.mlp_norm, shape.norm_eps)
            x = fused.silu_mul(_project(x, index, 2, layer, deltas))
            x = _project(x, index, 3, layer, deltas)
            x = fused.add_rms_norm(x, hidden, next_norm, shape.norm_eps)
        return weights.head(x if batch.wanted is None else x.index_select(0, batch.wanted))

    def _attend(
        self, qkv: torch.Tensor, index: int, layer: Layer, batch: PagedBatch
    ) -> torch.Tensor:
        """Stores keys and values, turned, and gives [tokens, heads · head_dim]."""
        shape, keys, values = self._shape, self._keys[index], self._values[index]
        fused.rotary_store(
            qkv,
            batch.positions,
            self._cos,
            self._sin,
            keys,
            values,
            batch.targets,
            layer.query_norm,
            layer.key_norm,
            shape.norm_eps,
        )
        q = qkv[:, : shape.heads]
        out = qkv.new_empty(len(q), shape.heads, shape.head_dim)
        scale, window, decodes = shape.head_dim**-0.5, shape.windows[index], batch.decodes
        if decodes:
            attention.decode(
                q[:decodes],
                keys,
                values,
                batch.table[:decodes],
                batch.lengths[:decodes],
                scale,
                window,
                None,
                out[:decodes],
                self._scratch,
            )
        if batch.longest:
            attention.prefill(
                q[decodes:],
                keys,
                values,
                batch.table[decodes:],
                batch.starts,
                batch.lengths[decodes:],
                batch.longest,
                scale,
                window,
                None,
                out[decodes:],
            )
        return out.flatten(1)


def _project(
    x: torch.Tensor, index: int, group: int, layer: Layer, deltas: PagedDeltas | None
) -> torch.Tensor:
    if deltas is not None:
        deltas.start(x, index, group)
    y = layer.matmuls[group](x)
    if deltas is not None:
        deltas.add(x, y, index, group)
    return layer.complete(y, group)
