"""What a piece of work cannot take less than: bytes and operations over measured rates.

Bytes are the fewest that memory must move (each input read once, each output written once);
operations count a multiplication and an addition as two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from replica.model.shape import GROUPS, ModelShape


@dataclass(frozen=True, slots=True)
class Rates:
    """As measured here. bytes_per_s: of a copy within the device, bytes read plus bytes written;
    read_bytes_per_s: of what only reads. flop_per_s: of a large matmul. copy_in_bytes_per_s: from
    page-locked host memory.
    """

    bytes_per_s: float
    read_bytes_per_s: float
    flop_per_s: float
    copy_in_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    bytes: float
    flop: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flop + other.flop)

    def floor_s(self, rates: Rates) -> float:
        return max(self.bytes / rates.bytes_per_s, self.flop / rates.flop_per_s)

    def bound_by(self, rates: Rates) -> str:
        by_bytes = self.bytes / rates.bytes_per_s >= self.flop / rates.flop_per_s
        return "bytes" if by_bytes else "flop"


def streamed_parameters(shape: ModelShape) -> int:
    """All that a decode step reads: every matrix but the embeddings, of which it takes rows."""
    layer = sum(inputs * outputs for inputs, outputs in shape.projections.values())
    layer += 2 * shape.hidden
    return shape.layers * layer + shape.hidden + shape.vocab * shape.hidden


def weight_bytes(shape: ModelShape, itemsize: int) -> int:
    """All of them, the embeddings too."""
    return (streamed_parameters(shape) + shape.vocab * shape.hidden) * itemsize


def kv_token_bytes(shape: ModelShape, itemsize: int) -> int:
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize


def image_bytes(shape: ModelShape, rank: int, itemsize: int) -> int:
    """An adapter over all seven projections."""
    widths = sum(inputs + outputs for inputs, outputs in shape.projections.values())
    return shape.layers * widths * rank * itemsize


def decode_bytes(shape: ModelShape, itemsize: int, contexts: Iterable[int]) -> int:
    """Of one step: weights once, and keys and values of each row's context."""
    weights = streamed_parameters(shape) * itemsize
    return weights + kv_token_bytes(shape, itemsize) * sum(contexts)


def lora_share(
    shape: ModelShape, itemsize: int, contexts: Iterable[int], ranks: Iterable[int]
) -> float:
    """What adapters add to the bytes of a decode step. ranks: one of each distinct adapter."""
    added = sum(image_bytes(shape, rank, itemsize) for rank in ranks)
    return added / decode_bytes(shape, itemsize, contexts)


def matmul_cost(shape: ModelShape, itemsize: int, tokens: int, outputs: int) -> Cost:
    """All matmuls of one prefill. outputs: tokens whose logits are asked for."""
    flop = 2.0 * tokens * _layer_parameters(shape) * shape.layers
    flop += 2.0 * outputs * shape.vocab * shape.hidden
    return Cost(streamed_parameters(shape) * itemsize, flop)


def _layer_parameters(shape: ModelShape) -> int:
    return sum(inputs * outputs for inputs, outputs in shape.projections.values())


def group_sizes(shape: ModelShape) -> list[tuple[int, int]]:
    """(inputs, outputs) of the one matmul of each group."""
    sizes = [[shape.projections[name] for name in group] for group in GROUPS]
    return [(group[0][0], sum(outputs for _, outputs in group)) for group in sizes]


def lora_cost(
    group: Sequence[tuple[int, int]], rows: Iterable[tuple[int, int]], itemsize: int
) -> Cost:
    """One group's delta, added in place. group: (inputs, outputs) of its projections, which share
    their input. rows: (rank, rows) of each adapter in the batch; y is read and written.
    """
    inputs, outputs = group[0][0], sum(out for _, out in group)
    total = Cost(0.0)
    for rank, count in rows:
        weights = rank * sum(wide + out for wide, out in group)
        moved = weights + count * (inputs + 2 * outputs)
        total += Cost(moved * itemsize, 2.0 * count * weights)
    return total


def attention_cost(
    shape: ModelShape, itemsize: int, rows: Iterable[tuple[int, int]], causal: bool = True
) -> Cost:
    """One layer's. rows: (queries, keys, the queries' own included) of each sequence."""
    bytes, flop = 0.0, 0.0
    for queries, keys in rows:
        seen = queries * keys - (queries * (queries - 1) / 2 if causal else 0)
        bytes += 2 * keys * shape.kv_heads * shape.head_dim * itemsize
        bytes += 2 * queries * shape.heads * shape.head_dim * itemsize
        flop += 4.0 * seen * shape.heads * shape.head_dim
    return Cost(bytes, flop)
