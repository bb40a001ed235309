"""An HF checkpoint's safetensors → the decoder's tensors, with q k v and gate up fused."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F

from replica.model.experts import Experts, load_experts
from replica.model.ranks import Linear, Ranks
from replica.model.shape import BLOCKS, GROUPS, ROW_PARALLEL, ModelShape, Shard
from replica.model.stored_checkpoint import Source, StoredCheckpoint, is_whole

_DUMMY_STD = 0.02
"""The usual initialization of these architectures, which keeps outputs finite."""


class Matmul(Protocol):
    """A matmul without bias: [tokens, in_features] → [tokens, out_features]."""

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features]: a view, or a copy if it is kept in another order."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder block. matmuls, biases: one for each of the shape's groups.

    experts: take the place of gate, up and down. ranks: the ranks that share the layer; None: it is
    whole.
    """

    matmuls: tuple[Matmul, ...]
    biases: tuple[torch.Tensor | None, ...]
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_post_norm: torch.Tensor | None = None
    mlp_post_norm: torch.Tensor | None = None
    experts: Experts | None = None
    ranks: Ranks | None = None

    def complete(self, y: torch.Tensor, group: int) -> torch.Tensor:
        """Sums y over ranks if needed, then adds the bias, in place. y: the group's matmul with
        deltas added.
        """
        if self.ranks is not None and GROUPS[group][0] in ROW_PARALLEL:
            self.ranks.all_reduce(y)
        bias = self.biases[group]
        return y if bias is None else y.add_(bias)


@dataclass(frozen=True, slots=True)
class Weights:
    """head: computes logits of the whole vocabulary. ranks: as in `Layer`."""

    embeddings: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear
    ranks: Ranks | None = None


def linear(weight: torch.Tensor) -> Matmul:
    """For bfloat16 on a CPU, oneDNN reorders the weight once instead of at every call. With 32 rows
    this saves a quarter of the matmul time of a 12 × 768 Llama.
    """
    mkldnn = torch.ops.mkldnn
    if weight.is_cpu and weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported():
        return _PackedMatmul(mkldnn._reorder_linear_weight(weight))
    return _PlainMatmul(weight)


@dataclass(frozen=True, slots=True, eq=False)
class _PlainMatmul:
    weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class _PackedMatmul:
    packed: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.packed.to_dense()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return y


def load_weights(
    model_dir: str,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    linear: Callable[[torch.Tensor], Matmul] = linear,
    dummy_seed: int | None = None,
    ranks: Ranks | None = None,
) -> Weights:
    """Raises ModelUnsupported naming a file or tensor that is missing, misshapen or unknown.

    shape: of the whole model. linear: makes a matmul of a weight [out_features, in_features].
    dummy_seed: seed of random weights, which need no files; None reads the checkpoint. ranks: the
    ranks that share the model; None: it is whole.
    """
    if dummy_seed is not None:
        return _weights(_Dummy(dummy_seed, dtype, device), shape, linear, ranks)
    with StoredCheckpoint(Path(model_dir), dtype, device, shape.quantization) as checkpoint:
        weights = _weights(checkpoint, shape, linear, ranks)
        checkpoint.check_empty()
    return weights


def _weights(
    source: Source,
    shape: ModelShape,
    linear: Callable[[torch.Tensor], Matmul],
    ranks: Ranks | None,
) -> Weights:
    size = (shape.vocab, shape.hidden)
    rows = slice(None) if ranks is None else ranks.vocab_rows(shape.vocab)
    # Where both names share a tensor, a checkpoint may have it under either.
    embedding = "model.embed_tokens.weight"
    only_head = shape.tied_embeddings and not source.holds(embedding)
    stored = "lm_head.weight" if only_head and source.holds("lm_head.weight") else embedding
    embeddings = source.take(stored, size)
    layers = tuple(_layer(source, shape, layer, linear, ranks) for layer in range(shape.layers))
    norm = _norm(source, shape, "model.norm", shape.hidden)
    tied = shape.tied_embeddings and not source.holds("lm_head.weight")
    own = embeddings[rows] if tied else source.take("lm_head.weight", size, (rows,))
    if shape.tied_embeddings and torch.equal(own, embeddings[rows]):
        own = embeddings[rows]  # else it was trained, and transformers does not tie it either
    head: Linear = linear(own)
    if ranks is not None:
        head = ranks.whole_head(head, shape.vocab)
    return Weights(embeddings, layers, norm, head, ranks)


def _layer(
    source: Source,
    shape: ModelShape,
    layer: int,
    linear: Callable[[torch.Tensor], Matmul],
    ranks: Ranks | None,
) -> Layer:
    shard = Shard() if ranks is None else ranks.shard
    prefix = f"model.layers.{layer}"
    has_bias = (shape.qkv_bias, shape.output_bias, shape.mlp_bias, shape.mlp_bias)
    matmuls: list[Matmul] = []
    biases: list[torch.Tensor | None] = []
    for group, module, bias in zip(shape.groups, BLOCKS, has_bias, strict=False):
        by_inputs = group[0] in ROW_PARALLEL
        weights, bias_parts = [], []
        for projection in group:
            name, (inputs, outputs) = (
                f"{prefix}.{module}.{projection}",
                shape.projections[projection],
            )
            if projection in ("qkv_proj", "gate_up_proj"):  # which have no bias
                whole = source.take(f"{name}.weight", (outputs, inputs))
                weights += [whole[rows] for rows in shard.cuts(shape.parts(projection))]
                continue
            columns = shard.cut(inputs) if by_inputs else slice(None)
            rows = slice(None) if by_inputs else shard.cut(outputs)
            weights.append(source.take(f"{name}.weight", (outputs, inputs), (rows, columns)))
            if bias:
                bias_parts.append(source.take(f"{name}.bias", (outputs,), (rows,)))
        matmuls.append(linear(torch.cat(weights)))
        biases.append(torch.cat(bias_parts) if bias else None)
    source.skip(f"{prefix}.self_attn.rotary_emb.inv_freq")  # in old Llamas; the decoder computes it

    def norm(name: str, size: int) -> torch.Tensor:
        return _norm(source, shape, f"{prefix}.{name}", size)

    def after(name: str) -> torch.Tensor | None:
        return norm(name, shape.hidden) if shape.post_norms else None

    before_mlp = "pre_feedforward_layernorm" if shape.post_norms else "post_attention_layernorm"
    return Layer(
        matmuls=tuple(matmuls),
        biases=tuple(biases),
        attention_norm=norm("input_layernorm", shape.hidden),
        mlp_norm=norm(before_mlp, shape.hidden),
        query_norm=norm("self_attn.q_norm", shape.head_dim) if shape.qk_norm else None,
        key_norm=norm("self_attn.k_norm", shape.head_dim) if shape.qk_norm else None,
        attention_post_norm=after("post_attention_layernorm"),
        mlp_post_norm=after("post_feedforward_layernorm"),
        experts=load_experts(source, shape, prefix, shard) if shape.mixture is not None else None,
        ranks=ranks,
    )


def _norm(source: Source, shape: ModelShape, name: str, size: int) -> torch.Tensor:
    """With the shape's offset it is in float32, as a sum with 1 has fewer bits in 16."""
    weight = source.take(f"{name}.weight", (size,))
    return weight.float() + shape.norm_offset if shape.norm_offset else weight


class _Dummy:
    """Random tensors of any name and size, determined by seed and device type."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def take(self, name: str, size: tuple[int, ...], part: tuple[slice, ...] = ()) -> torch.Tensor:
        """Draws the whole tensor, so that all ranks have parts of the same model."""
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        if len(size) == 1:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            tensor.normal_(0.0, _DUMMY_STD, generator=self._generator)
        return tensor if is_whole(part) else tensor[part].clone()

    def holds(self, name: str) -> bool:
        return False

    def skip(self, name: str) -> None:
        pass
