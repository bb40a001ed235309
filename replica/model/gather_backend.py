"""A decoder's operations in torch, over pages that are gathered."""

import torch
from torch.nn import functional as F

from lora_kernels.ops import silu_mul
from replica.model.gather_attention import GatherAttention, ModelInputs
from replica.model.shape import ModelShape
from replica.model.weights import Layer


class GatherBackend:
    def __init__(
        self,
        shape: ModelShape,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        attention: GatherAttention,
    ) -> None:
        self._shape = shape
        self._tables = cos_sin
        self._attention = attention
        self._heads = [shape.heads, shape.kv_heads, shape.kv_heads]

    def begin(self, batch: ModelInputs) -> None:
        self._attention.begin(batch)
        cos, sin = self._tables
        self._cos = cos.index_select(0, batch.positions)[:, None]
        self._sin = sin.index_select(0, batch.positions)[:, None]

    def attend(self, qkv: torch.Tensor, index: int, layer: Layer) -> torch.Tensor:
        self.rotate(qkv, layer)
        q, keys, values = torch.split(qkv, self._heads, 1)
        scale, window = self._shape.softmax_scale, self._shape.windows[index]
        return self._attention.attend(index, q, keys, values, scale, window).flatten(1)

    def rotate(self, qkv: torch.Tensor, layer: Layer) -> None:
        """Rotates queries and keys by their positions, in place."""
        heads, kv_heads = self._shape.heads, self._shape.kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, :heads], qkv[:, heads:-kv_heads]
            queries.copy_(self.norm(queries, layer.query_norm))
            keys.copy_(self.norm(keys, layer.key_norm))
        rotated = qkv[:, :-kv_heads]
        # The first half of sin is already negated.
        across = rotated.roll(rotated.shape[-1] // 2, -1)
        rotated.copy_(torch.addcmul(rotated * self._cos, across, self._sin))

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._shape.norm_eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        residual.add_(x, alpha=self._shape.residual_scale)
        return self.norm(residual, weight)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up)
