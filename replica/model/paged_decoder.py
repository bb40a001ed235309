"""The transformer over one packed batch, with kernels that read KV through page tables."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from lora_kernels import attention, fused
from replica.model.shape import ModelShape
from replica.model.weights import Layer, Weights


class PagedDeltas(Protocol):
    """Adds the adapters' deltas to a group's output. start: called before the base matmul of x."""

    def start(self, x: torch.Tensor, layer: int, group: int) -> None: ...

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """`decodes` rows of one token, then chunks. All tensors are int32 and on the device.

    tokens, positions: [tokens]. targets: [tokens], where a token's keys and values are stored
    (page · page_tokens + offset). table: [rows, pages], the pages of each row. lengths: [rows],
    number of keys including this step's. starts: [chunks + 1], where each chunk begins among the
    chunks' tokens. longest: tokens of the longest chunk.
    wanted: [outputs], tokens whose logits are computed; None: all.
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
    """Views flat memory as consecutive pages for a `PagedDecoder`. It may be uninitialized."""
    size = (shape.layers, 2, shape.kv_heads, page_tokens, shape.head_dim)
    return memory.view(-1, *size)


class PagedDecoder:
    """cache: [pages + 1, layers, 2, kv_heads, page_tokens, head_dim]. A page is contiguous, so that
    it can be moved. The last page is the scratch page that padding rows write to.
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
        """Logits [outputs, vocab]. deltas: None if all rows use the base model."""
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
        """Rotates and stores keys and values. Returns [tokens, heads · head_dim]."""
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
