"""A decoder's operations in Triton kernels that read pages through page tables."""

import torch

from lora_kernels import fused
from replica.model.paged_attention import PagedAttention, PagedBatch
from replica.model.shape import ModelShape
from replica.model.weights import Layer


class PagedBackend:
    def __init__(
        self,
        shape: ModelShape,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        attention: PagedAttention,
    ) -> None:
        self._shape = shape
        self._cos, self._sin = cos_sin
        self._attention = attention

    def begin(self, batch: PagedBatch) -> None:
        self._attention.begin(batch)
        self._batch = batch

    def attend(self, qkv: torch.Tensor, index: int, layer: Layer) -> torch.Tensor:
        shape, attention = self._shape, self._attention
        fused.rotary_store(
            qkv,
            self._batch.positions,
            self._cos,
            self._sin,
            attention.keys[index],
            attention.values[index],
            self._batch.targets,
            layer.query_norm,
            layer.key_norm,
            shape.norm_eps,
        )
        q = qkv[:, : shape.heads]
        return attention.mix(index, q, shape.softmax_scale, shape.windows[index]).flatten(1)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, weight, self._shape.norm_eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        shape = self._shape
        return fused.add_rms_norm(x, residual, weight, shape.norm_eps, shape.residual_scale)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return fused.silu_mul(gate_up)
