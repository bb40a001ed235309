"""Rows of a batch over a paged cache, for the tests of attention; they run on a GPU as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_kernels import attention, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, LAYER = 2, 1


@dataclass(frozen=True)
class Rows:
    """One layer's views of a page-major cache, and each row's queries."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def place(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: [length, kv_heads, head_dim], into the row's pages."""
        at = torch.arange(len(keys), device=DEVICE)
        page_tokens = self.keys.shape[2]
        pages = self.table[row, at // page_tokens].long()
        self.keys[pages, :, at % page_tokens] = keys.to(self.keys)
        self.values[pages, :, at % page_tokens] = values.to(self.values)

    def expected(
        self, scale: float, window: int | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        over = (self.q, self.keys, self.values, self.table, self.starts, self.lengths)
        return reference.attention(*over, scale, window, softcap)

    def decoded(
        self,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        scratch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if scratch is None:
            scratch = attention.decode_scratch(*self.q.shape, DEVICE).fill_(float("nan"))
        out = torch.full_like(self.q, float("nan"))
        over = (self.q, self.keys, self.values, self.table, self.lengths)
        attention.decode(*over, scale, window, softcap, out, scratch)
        return out

    def prefilled(
        self, scale: float, window: int | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        out = torch.full_like(self.q, float("nan"))
        over = (self.q, self.keys, self.values, self.table, self.starts, self.lengths)
        attention.prefill(*over, int(self.starts.diff().max()), scale, window, softcap, out)
        return out


def make_rows(
    lengths: Sequence[int],
    chunks: Sequence[int] | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    pages_max: int | None = None,
    seed: int = 0,
) -> Rows:
    """Random contents; what lies past a row's last key, and in pages of no row, is NaN."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [1] * len(lengths) if chunks is None else chunks
    needed = [-(-length // page_tokens) for length in lengths]
    size = (sum(needed) + 1, LAYERS, 2, kv_heads, page_tokens, head_dim)
    cache = torch.full(size, float("nan"), dtype=dtype, device=DEVICE)
    # What the table holds past a row's pages must not be followed.
    table = torch.full((len(lengths), pages_max or max(needed) + 1), 2**30, dtype=torch.int32)
    order = torch.randperm(sum(needed), generator=generator).int()
    for line, pages in zip(table, order.split(needed), strict=True):
        line[: len(pages)] = pages
    # As q lies in the output of one projection of q, k and v.
    qkv = torch.randn(sum(chunks), heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    rows = Rows(
        qkv.to(DEVICE)[:, :heads],
        cache[:, LAYER, 0],
        cache[:, LAYER, 1],
        table.to(DEVICE),
        torch.tensor([0, *chunks], device=DEVICE).cumsum(0).int(),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )
    for row, length in enumerate(lengths):
        contents = torch.randn(2, length, kv_heads, head_dim, generator=generator)
        rows.place(row, contents[0], contents[1])
    return rows


PICKING_SCALE = 128.0


def picking(rows: Rows, window: int | None = None) -> tuple[Rows, torch.Tensor]:
    """Integers, by which each query takes just one key's value; what has to come out, exactly.

    A key scores its place in a random order (up to 4,096, two digits of base 64) times
    `PICKING_SCALE`, which leaves the second largest nothing.
    """
    generator = torch.Generator().manual_seed(1)
    q = torch.zeros_like(rows.q)
    q[..., 0], q[..., 1] = 64, 1
    expected = torch.empty_like(q)
    group = q.shape[1] // rows.keys.shape[1]
    for row, length in enumerate(rows.lengths.tolist()):
        place = torch.randperm(length, generator=generator)
        size = (2, length, rows.keys.shape[1], rows.keys.shape[3])
        keys, values = torch.randint(1, 100, size, generator=generator).unbind()
        keys[..., 0], keys[..., 1] = place[:, None] // 64, place[:, None] % 64
        rows.place(row, keys, values)
        begin, end = rows.starts[row : row + 2].tolist()
        for token in range(begin, end):
            last = length - end + token
            first = 0 if window is None else max(last + 1 - window, 0)
            best = first + int(place[first : last + 1].argmax())
            expected[token] = values[best].repeat_interleave(group, 0).to(q)
    return replace(rows, q=q), expected


def counting(rows: Rows) -> tuple[Rows, torch.Tensor]:
    """Integers, by which all keys weigh the same; what has to come out is counts over a length.

    Key n has 1 at place n of the value, modulo its size. The scale does not matter. A key's score
    is the sum of the query, which for integers is the same in any order: all weights are 1, and
    the last division alone rounds.
    """
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-8, 9, rows.q.shape, generator=generator).to(rows.q)
    head_dim = rows.q.shape[2]
    expected = torch.empty_like(rows.q, dtype=torch.float64)
    for row, length in enumerate(rows.lengths.tolist()):
        at = torch.arange(length)
        ones = torch.zeros(length, rows.keys.shape[1], head_dim)
        ones[at, :, at % head_dim] = 1
        rows.place(row, torch.ones_like(ones), ones)
        begin, end = rows.starts[row : row + 2].tolist()
        counts = ones[:, 0].double().cumsum(0)[length - (end - begin) :]
        expected[begin:end] = (counts / counts.sum(1, keepdim=True))[:, None].to(expected)
    return replace(rows, q=q), expected
