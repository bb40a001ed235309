"""A model of our own decoders: its weights and tables, on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from replica.model.decoder import Decoder, Deltas
from replica.model.gather_attention import GatherAttention, ModelInputs
from replica.model.gather_backend import GatherBackend
from replica.model.ranks import Ranks
from replica.model.shape import ModelShape, Shape
from replica.model.weights import Weights

if TYPE_CHECKING:
    from replica.model.paged_attention import PagedAttention, PagedBatch


class Forward(Protocol):
    """forward: logits [outputs, vocab]. hidden: all tokens' states after the last norm, [tokens,
    hidden]. head: the logits of the tokens `wanted`, by these states. deltas: None if all rows use
    the base model.
    """

    def forward(self, batch: ModelInputs | PagedBatch, deltas: Deltas | None) -> torch.Tensor: ...

    def hidden(self, batch: ModelInputs | PagedBatch, deltas: Deltas | None) -> torch.Tensor: ...

    def head(
        self, hidden: torch.Tensor, wanted: torch.Tensor | None, deltas: Deltas | None
    ) -> torch.Tensor: ...


class Model(Protocol):
    """What an executor needs. shape: of this rank's part. context: longest sequence served.
    tells_prompts: its decoders' `head` gives the logits of their `hidden`.
    """

    @property
    def shape(self) -> Shape: ...

    @property
    def context(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def ranks(self) -> Ranks | None: ...

    @property
    def tells_prompts(self) -> bool: ...

    def decoder(self, attention: GatherAttention | PagedAttention) -> Forward: ...

    def weight(self, layer: int, projection: str) -> torch.Tensor:
        """[out_features, in_features], of this rank's part. Any thread may call it."""
        ...


@dataclass(frozen=True, slots=True)
class NativeModel:
    """cos_sin, window_cos_sin: see `rotary_tables` and `GatherBackend`."""

    shape: ModelShape
    weights: Weights
    cos_sin: tuple[torch.Tensor, torch.Tensor]
    window_cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def context(self) -> int:
        return len(self.cos_sin[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embeddings.device

    @property
    def ranks(self) -> Ranks | None:
        return self.weights.ranks

    @property
    def tells_prompts(self) -> bool:
        return True

    def weight(self, layer: int, projection: str) -> torch.Tensor:
        fused, start = self.weights.layers[layer].matmuls, 0
        groups = self.shape.groups
        (group,) = (i for i, names in enumerate(groups) if projection in names)
        for name in groups[group]:
            if name == projection:
                break
            start += self.shape.projections[name][1]
        return fused[group].weight[start : start + self.shape.projections[projection][1]]

    def decoder(self, attention: GatherAttention | PagedAttention) -> Decoder:
        if isinstance(attention, GatherAttention):
            gather = GatherBackend(self.shape, self.cos_sin, attention, self.window_cos_sin)
            return Decoder(self.shape, self.weights, gather)
        # It imports triton.
        from replica.model.paged_backend import PagedBackend

        paged = PagedBackend(self.shape, self.cos_sin, attention, self.window_cos_sin)
        return Decoder(self.shape, self.weights, paged)
