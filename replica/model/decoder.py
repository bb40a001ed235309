"""The transformer over one packed batch of prefill chunks and decode rows, over a backend: torch
operations that gather pages, or kernels that read them through page tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from lora_kernels.vocabulary import Vocabulary
from replica.model.gather_attention import ModelInputs
from replica.model.shape import ModelShape
from replica.model.weights import Layer, Weights

if TYPE_CHECKING:
    from replica.model.paged_attention import PagedBatch

# Gate and up in a shape's groups.
GATE_UP = 2


class Deltas(Protocol):
    """Adds the adapters' deltas to a group's output, in place and before the bias.

    start: called before the base matmul of x, so that work on x alone can overlap it. add_gated: of
    gate and up, and returns their gated activation, by SiLU or GELU. vocabulary: the same for
    embedding and head.
    gained: [tokens, 1], 1 for those whose adapter has gains, else 0; None: no adapter has.
    """

    @property
    def gained(self) -> torch.Tensor | None: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    def start(self, x: torch.Tensor, layer: int, group: int) -> None: ...

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...

    def add_gated(
        self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int, gelu: bool = False
    ) -> torch.Tensor: ...


class Backend(Protocol):
    """Computes what is not a matmul. begin: called before each batch.

    attend: rotates queries and keys, stores keys and values; qkv [tokens, heads + 2 · kv_heads,
    head_dim] → [tokens, heads · head_dim]. add_norm: adds x, times the shape's `residual_scale`,
    to `residual` in place and returns the norm of the sum. gated: [tokens, 2 · inner], gate then
    up → [tokens, inner].
    """

    def begin(self, batch: Any) -> None: ...

    def attend(self, qkv: torch.Tensor, index: int, layer: Layer) -> torch.Tensor: ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor: ...

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor: ...


class Decoder:
    def __init__(self, shape: ModelShape, weights: Weights, backend: Backend) -> None:
        self._head_dim = shape.head_dim
        self._embed_scale = shape.embed_scale
        if shape.embed_scale_rounded:
            rounded = torch.tensor(shape.embed_scale, dtype=weights.embeddings.dtype)
            self._embed_scale = float(rounded)
        self._logits_divisor, self._final_softcap = shape.logits_divisor, shape.final_softcap
        self._gelu = shape.activation == "gelu_tanh"
        self._gates_with_deltas = not shape.fused_projections
        self._weights = weights
        self._backend = backend

    def forward(self, batch: ModelInputs | PagedBatch, deltas: Deltas | None) -> torch.Tensor:
        return self.head(self.hidden(batch, deltas), batch.wanted, deltas)

    def head(
        self, hidden: torch.Tensor, wanted: torch.Tensor | None, deltas: Deltas | None
    ) -> torch.Tensor:
        x = hidden if wanted is None else hidden.index_select(0, wanted)
        logits = self._weights.head(x)
        if deltas is not None:
            deltas.vocabulary.head(x, logits, wanted)
        if self._logits_divisor != 1.0:
            logits.div_(self._logits_divisor)
        if self._final_softcap is not None:
            logits.div_(self._final_softcap).tanh_().mul_(self._final_softcap)
        return logits

    def hidden(self, batch: ModelInputs | PagedBatch, deltas: Deltas | None) -> torch.Tensor:
        weights, backend = self._weights, self._backend
        backend.begin(batch)
        norms = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        hidden = F.embedding(batch.tokens, weights.embeddings)
        if self._embed_scale != 1.0:
            hidden.mul_(self._embed_scale)
        if deltas is not None:
            deltas.vocabulary.embed(batch.tokens, hidden, self._embed_scale)
        x = backend.norm(hidden, weights.layers[0].attention_norm)
        for index, (layer, next_norm) in enumerate(zip(weights.layers, norms, strict=True)):
            qkv = _project(x, index, 0, layer, deltas).view(len(x), -1, self._head_dim)
            x = backend.attend(qkv, index, layer)
            x = _project(x, index, 1, layer, deltas)
            if layer.attention_post_norm is not None:
                x = backend.norm(x, layer.attention_post_norm)
            x = backend.add_norm(x, hidden, layer.mlp_norm)
            if layer.experts is None:
                x = self._gate(x, index, layer, deltas)
                x = _project(x, index, 3, layer, deltas)
            else:
                x = layer.experts(x, backend.gated)
                if layer.ranks is not None:
                    layer.ranks.all_reduce(x)
            if layer.mlp_post_norm is not None:
                x = backend.norm(x, layer.mlp_post_norm)
            x = backend.add_norm(x, hidden, next_norm)
        return x

    def _gate(
        self, x: torch.Tensor, index: int, layer: Layer, deltas: Deltas | None
    ) -> torch.Tensor:
        apart = layer.biases[GATE_UP] is not None or not self._gates_with_deltas
        if deltas is None or apart:
            return self._backend.gated(_project(x, index, GATE_UP, layer, deltas))
        deltas.start(x, index, GATE_UP)
        return deltas.add_gated(x, layer.matmuls[GATE_UP](x), index, GATE_UP, self._gelu)


def _project(
    x: torch.Tensor, index: int, group: int, layer: Layer, deltas: Deltas | None
) -> torch.Tensor:
    if deltas is not None:
        deltas.start(x, index, group)
    y = layer.matmuls[group](x)
    if deltas is not None:
        deltas.add(x, y, index, group)
    return layer.complete(y, group)


def rotary_tables(
    shape: ModelShape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    rope: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [tokens, head_dim] each. The first half of sin is negated.

    rope: None: the shape's `rope`.
    """
    frequencies, scale = _frequencies(shape, shape.rope if rope is None else rope)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return both[0].to(device, dtype), both[1].to(device, dtype)


def _frequencies(shape: ModelShape, rope: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Of any architecture: Gemma 3's would be asked for the kind of a layer.
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters=dict(rope),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return frequencies, scale
