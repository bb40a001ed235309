"""Attention over paged keys and values with Triton kernels that read them through page tables."""

from dataclasses import dataclass

import torch

from cluster.errors import ModelUnsupported
from lora_kernels import attention
from replica.model.shape import Shape


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


def paged_cache(memory: torch.Tensor, shape: Shape, page_tokens: int) -> torch.Tensor:
    """Views flat memory as consecutive pages for a `PagedAttention`. It may be uninitialized."""
    size = (shape.cached_layers, 2, shape.kv_heads, page_tokens, shape.head_dim)
    return memory.view(-1, *size)


class PagedAttention:
    """Stores the keys and values of one batch at a time, and attends: `begin`, then for each layer
    `attend`, or `mix` where another kernel has stored.

    cache: [pages + 1, layers, 2, kv_heads, page_tokens, head_dim]. A page is contiguous, so that
    it can be moved. The last page is the scratch page that padding rows write to.
    keys, values: of each layer, [pages + 1, kv_heads, page_tokens, head_dim].
    """

    def __init__(self, cache: torch.Tensor, heads: int, rows_max: int) -> None:
        """heads: query heads. rows_max: the most rows of one token in a batch."""
        self.keys = list(cache[:, :, 0].unbind(1))
        self.values = list(cache[:, :, 1].unbind(1))
        self._page_tokens = cache.shape[4]
        self._kv_shape = cache.shape[3], cache.shape[5]
        self._scratch = attention.decode_scratch(rows_max, heads, cache.shape[5], cache.device)

    def begin(self, batch: PagedBatch) -> None:
        self._batch = batch

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
        """[tokens, heads, head_dim]. q, keys, values: [tokens, heads or kv_heads, head_dim]."""
        if keys.shape[1:] != values.shape[1:] or keys.shape[1:] != self._kv_shape:
            raise ModelUnsupported(
                "keys and values are not of one size in all layers, which Triton kernels need "
                "(set `kernels: torch`)",
                field="kernels",
            )
        targets, size = self._batch.targets, self._page_tokens
        page, offset = targets // size, targets % size
        self.keys[layer][page, :, offset] = keys
        self.values[layer][page, :, offset] = values
        return self.mix(layer, q, scale, window, softcap)

    def mix(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """[tokens, heads, head_dim]. q: the same, contiguous in head_dim."""
        batch, keys, values = self._batch, self.keys[layer], self.values[layer]
        decodes = batch.decodes
        out = q.new_empty(q.shape)
        if decodes:
            attention.decode(
                q[:decodes],
                keys,
                values,
                batch.table[:decodes],
                batch.lengths[:decodes],
                scale,
                window,
                softcap,
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
                softcap,
                out[decodes:],
            )
        return out
