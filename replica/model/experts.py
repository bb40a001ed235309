"""A layer's mixture of experts: a router sends each token through few of many MLPs (Shazeer et
al., 2017), which run as two grouped matmuls.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from replica.model.families import Mixture
from replica.model.shape import ModelShape, Shard
from replica.model.stored_checkpoint import Source

_STORED = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
"""The checkpoint's module, and the gate, up and down of each of its experts."""


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """router: [experts, hidden]. gate_up: [experts, 2 · inner, hidden]. down: [experts, hidden,
    inner], of this rank's part. numbers: of the experts.
    """

    mixture: Mixture
    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    numbers: torch.Tensor

    def __call__(
        self, x: torch.Tensor, gated: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """[tokens, hidden], which ranks sum. gated: the backend's.

        Tokens are sorted by expert, and a group may be empty, so the host does not wait for the
        router's choice, and a CUDA graph can hold it. On CUDA, though, `grouped_mm` itself reads
        the groups' ends on the host, but for bfloat16 on compute capability 9 or 10.
        """
        active = self.mixture.active
        weights, chosen = F.linear(x, self.router).softmax(-1, torch.float32).topk(active)
        if self.mixture.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.mixture.rounded:
            weights = weights.to(x.dtype)
        sorted_experts, order = chosen.flatten().sort()
        ends = torch.searchsorted(sorted_experts, self.numbers, right=True, out_int32=True)
        inner = gated(F.grouped_mm(x[order // active], self.gate_up.mT, offs=ends))
        outputs = F.grouped_mm(inner, self.down.mT, offs=ends)
        by_token = torch.empty_like(outputs).index_copy_(0, order, outputs)
        mixed = by_token.view(len(x), active, -1) * weights[..., None]
        return mixed.sum(1).to(x.dtype)


def load_experts(source: Source, shape: ModelShape, prefix: str, shard: Shard) -> Experts:
    """Of the layer named `prefix`. Raises ModelUnsupported. shape: of the whole model."""
    mixture, hidden, inner = shape.mixture, shape.hidden, shape.intermediate
    assert mixture is not None
    every, cut = slice(None), shard.cut(inner)
    part = cut.stop - cut.start
    fused = f"{prefix}.mlp.experts"
    block, *names = _STORED[shape.architecture]
    if source.holds(f"{fused}.gate_up_proj"):  # with `save_original_format=False`
        router = source.take(f"{prefix}.mlp.gate.weight", (mixture.experts, hidden))
        whole = source.take(f"{fused}.gate_up_proj", (mixture.experts, 2 * inner, hidden))
        gate_up = torch.cat([whole[:, rows] for rows in shard.cuts((inner, inner))], 1)
        size = (mixture.experts, hidden, inner)
        down = source.take(f"{fused}.down_proj", size, (every, every, cut))
    else:
        router = source.take(f"{prefix}.{block}.gate.weight", (mixture.experts, hidden))
        # Filled one by one: beside them only one expert is in memory.
        gate_up = router.new_empty(mixture.experts, 2 * part, hidden)
        down = router.new_empty(mixture.experts, hidden, part)
        for expert in range(mixture.experts):
            gate_name, up_name, down_name = (
                f"{prefix}.{block}.experts.{expert}.{name}.weight" for name in names
            )
            gate_up[expert, :part] = source.take(gate_name, (inner, hidden), (cut,))
            gate_up[expert, part:] = source.take(up_name, (inner, hidden), (cut,))
            down[expert] = source.take(down_name, (hidden, inner), (every, cut))
    numbers = torch.arange(mixture.experts, device=router.device)
    return Experts(mixture, router, gate_up, down, numbers)
