"""Random inputs of the kernels, on the device: pages, chunks, adapters in an arena."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels.reference import Directory

PAGE_TOKENS = 16
# Of caches and adapters; a launch is for one of them.
LAYERS = 2


@dataclass(frozen=True, slots=True)
class Heads:
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(slots=True)
class Paged:
    """Rows of queries over pages in no order. rows: (queries, keys, the queries' own included).
    cache: [pages, layers, 2, kv_heads, page_tokens, head_dim]; keys, values: of its last layer.
    """

    rows: Sequence[tuple[int, int]]
    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    out: torch.Tensor

    @property
    def keys(self) -> torch.Tensor:
        return self.cache[:, -1, 0]

    @property
    def values(self) -> torch.Tensor:
        return self.cache[:, -1, 1]

    @property
    def queries_max(self) -> int:
        return max(queries for queries, _ in self.rows)

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


class Draw:
    """By seed, on one device, in one dtype."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(size, generator=self._generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def integers(self, low: int, high: int, *size: int) -> torch.Tensor:
        """From low to high, both included, in the dtype of the draw."""
        return self.indices(high - low + 1, *size).add_(low).to(self.dtype)

    def indices(self, count: int, *size: int) -> torch.Tensor:
        return torch.randint(count, size, generator=self._generator, device=self.device)

    def uniform(self, *size: int) -> torch.Tensor:
        return torch.rand(size, generator=self._generator, device=self.device)

    def order(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)

    def paged(self, heads: Heads, rows: Sequence[tuple[int, int]], layers: int = LAYERS) -> Paged:
        """Keys and values are one layer of a cache whose pages are whole pieces."""
        used = [-(-keys // PAGE_TOKENS) for _, keys in rows]
        pages = sum(used) + 1
        cache = self.normal(pages, layers, 2, heads.kv_heads, PAGE_TOKENS, heads.head_dim)
        order = self.order(pages - 1).tolist()
        width = -(-max(used) // 16) * 16
        table = torch.full((len(rows), width), pages - 1, dtype=torch.int32)
        for row, count in enumerate(used):
            table[row, :count] = torch.tensor(order[:count], dtype=torch.int32)
            del order[:count]
        queries = torch.tensor([0, *(queries for queries, _ in rows)])
        q = self.normal(int(queries.sum()), heads.heads, heads.head_dim)
        return Paged(
            rows,
            q,
            cache,
            table.to(self.device),
            queries.cumsum(0).to(self.device, torch.int32),
            torch.tensor([keys for _, keys in rows], dtype=torch.int32, device=self.device),
            torch.full_like(q, float("nan")),
        )

    def adapters(
        self,
        projections: Sequence[tuple[int, int]],
        ranks: Sequence[Sequence[int]],
        layers: int = LAYERS,
    ) -> tuple[Directory, torch.Tensor]:
        """ranks: of each adapter, from slot 1 on, one for each of the projections."""
        directory = Directory(len(ranks) + 1, layers, len(projections))
        start = 0
        for slot, own in enumerate(ranks, 1):
            for layer in range(layers):
                sized = zip(projections, own, strict=True)
                for index, ((inputs, outputs), rank) in enumerate(sized):
                    at = slot, layer, index
                    directory.a_offset[at] = start
                    directory.b_offset[at] = start + rank * inputs
                    directory.rank[at] = rank
                    directory.scale[at] = 0.5 + slot / 8
                    start += rank * (inputs + outputs)
            directory.generation[slot] += 1
        return directory, self.normal(max(start, 1)).mul_(0.1)


def one_hot(paged: Paged, draw: Draw) -> torch.Tensor:
    """Makes every query see one key alone, by integers that are exact in any of the dtypes.

    Keys are rows of ±1 and queries 8 times the key they look for: with a scale of 1 its weight is
    1 and that of others 0. Values are integers. Gives what the outputs must be, bit by bit.
    """
    size = paged.q.shape[2]
    group = paged.q.shape[1] // paged.keys.shape[1]
    sign = draw.integers(0, 1, *paged.keys.shape).mul_(2).sub_(1)
    paged.keys.copy_(sign)
    paged.values.copy_(draw.integers(-64, 64, *paged.values.shape))
    wanted = torch.empty_like(paged.q)
    start = 0
    for row, (queries, keys) in enumerate(paged.rows):
        held = paged.table[row, : -(-keys // PAGE_TOKENS)].long()
        own_keys, own_values = (
            side[held].permute(0, 2, 1, 3).reshape(-1, side.shape[1], size)[:keys]
            for side in (paged.keys, paged.values)
        )
        position = torch.arange(keys - queries, keys, device=draw.device)
        looked = (draw.uniform(queries) * (position + 1)).long().clamp_(max=keys - 1)
        looked = torch.minimum(looked, position)
        target = slice(start, start + queries)
        paged.q[target] = own_keys[looked].repeat_interleave(group, 1) * 8
        wanted[target] = own_values[looked].repeat_interleave(group, 1)
        start += queries
    return wanted
