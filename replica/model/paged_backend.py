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
        window_cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """window_cos_sin: of layers with a window; None: as of all others."""
        self._shape = shape
        others = cos_sin if window_cos_sin is None else window_cos_sin
        self._tables = [cos_sin if window is None else others for window in shape.windows]
        self._gated = fused.gelu_mul if shape.activation == "gelu_tanh" else fused.silu_mul
        self._attention = attention

    def begin(self, batch: PagedBatch) -> None:
        self._attention.begin(batch)
        self._batch = batch

    def attend(self, qkv: torch.Tensor, index: int, layer: Layer) -> torch.Tensor:
        shape, attention = self._shape, self._attention
        fused.rotary_store(
            qkv,
            self._batch.positions,
            *self._tables[index],
            attention.keys[index],
            attention.values[index],
            self._batch.targets,
            layer.query_norm,
            layer.key_norm,
            shape.norm_eps,
        )
        q = qkv[:, : shape.heads]
        window, softcap = shape.windows[index], shape.softcap
        return attention.mix(index, q, shape.softmax_scale, window, softcap).flatten(1)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, weight, self._shape.norm_eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        shape = self._shape
        return fused.add_rms_norm(x, residual, weight, shape.norm_eps, shape.residual_scale)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up)
