"""A decoder's operations in torch, over pages that are gathered."""

import torch
from torch.nn import functional as F

from lora_kernels.ops import gelu_mul, silu_mul
from replica.model.gather_attention import GatherAttention, ModelInputs
from replica.model.shape import ModelShape
from replica.model.weights import Layer


class GatherBackend:
    def __init__(
        self,
        shape: ModelShape,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        attention: GatherAttention,
        window_cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """window_cos_sin: of layers with a window; None: as of all others."""
        self._shape = shape
        self._tables, self._window_tables = cos_sin, window_cos_sin
        self._gated = gelu_mul if shape.activation == "gelu_tanh" else silu_mul
        self._attention = attention
        self._heads = [shape.heads, shape.kv_heads, shape.kv_heads]

    def begin(self, batch: ModelInputs) -> None:
        self._attention.begin(batch)
        self._turns = self._window_turns = _at(self._tables, batch.positions)
        if self._window_tables is not None:
            self._window_turns = _at(self._window_tables, batch.positions)

    def attend(self, qkv: torch.Tensor, index: int, layer: Layer) -> torch.Tensor:
        scale, window = self._shape.softmax_scale, self._shape.windows[index]
        self.rotate(qkv, layer, self._turns if window is None else self._window_turns)
        q, keys, values = torch.split(qkv, self._heads, 1)
        softcap = self._shape.softcap
        return self._attention.attend(index, q, keys, values, scale, window, softcap).flatten(1)

    def rotate(
        self, qkv: torch.Tensor, layer: Layer, turns: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Rotates queries and keys in place. turns: cos and sin of the tokens' positions."""
        heads, kv_heads = self._shape.heads, self._shape.kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, :heads], qkv[:, heads:-kv_heads]
            queries.copy_(self.norm(queries, layer.query_norm))
            keys.copy_(self.norm(keys, layer.key_norm))
        rotated = qkv[:, :-kv_heads]
        # The first half of sin is already negated.
        across = rotated.roll(rotated.shape[-1] // 2, -1)
        rotated.copy_(torch.addcmul(rotated * turns[0], across, turns[1]))

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == x.dtype:
            return F.rms_norm(x, weight.shape, weight, self._shape.norm_eps)
        return F.rms_norm(x.float(), weight.shape, weight, self._shape.norm_eps).to(x.dtype)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        residual.add_(x, alpha=self._shape.residual_scale)
        return self.norm(residual, weight)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up)


def _at(
    tables: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of cos and sin, [tokens, 1, head_dim]."""
    cos, sin = (table.index_select(0, positions)[:, None] for table in tables)
    return cos, sin
