"""Paged attention in Triton: one query a row (decode), or a chunk of each row's (prefill).

Keys and values lie in pages, `[pages, kv_heads, page_tokens, head_dim]` with any strides but the
last, and a row's pages are named by its line of `table`. The query heads that share a KV head are
packed into one program's rows, so that each key is read once for all of them.

Decode has one program for each row and KV head. When those are too few to fill the device, or rows
may be long, a row's keys are cut into segments (arXiv 2311.01282) and a second kernel joins them.
How many is decided by shapes alone and how long each is by the row's own length, on the device: a
captured CUDA graph replays with other lengths.

For each window and softcap there is one compiled decode, a join for few and one for many segments,
and a prefill of small and one of large tiles: no other number of rows compiles anything again.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.attention

from lora_kernels.attention_kernels import decode_kernel, join_kernel, prefill_kernel

_LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tile:
    """queries: rows of a program, one for each query token and head that share a KV head."""

    queries: int
    keys: int
    warps: int
    stages: int


# For Hopper (132 multiprocessors, 227 KiB of shared memory each), from what the compiler reports of
# registers and shared memory; on an H200 decode then read at 88% of what reads alone reach (64 rows
# of 1k). Keyed by bytes an element and padded head_dim.
# Decode moves bytes: 16 KiB of K and V a block, two blocks in flight (the table's page numbers are
# read ahead of them and take the other stages), five programs resident.
_DECODE = {
    (2, 64): Tile(16, 64, 4, 5),
    (2, 128): Tile(16, 32, 4, 5),
    (2, 256): Tile(16, 16, 4, 5),
    (4, 64): Tile(16, 32, 4, 5),
    (4, 128): Tile(16, 16, 4, 5),
    (4, 256): Tile(16, 16, 4, 3),
}
# Prefill computes: shapes that Triton's own fused-attention tutorial settles on for H100 (fp32: no
# tensor cores, so as large as registers allow).
_PREFILL = {
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(128, 32, 8, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(16, 16, 4, 2),
    (4, 256): Tile(16, 16, 4, 2),
}
# When 128 queries a program would leave multiprocessors idle, or most of a program's rows empty.
_PREFILL_SMALL = {
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(64, 64, 4, 3),
    (2, 256): Tile(64, 32, 8, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(16, 16, 4, 2),
    (4, 256): Tile(16, 16, 4, 2),
}
_MULTIPROCESSORS = 132
# Decode programs that fill the device, at four a multiprocessor.
_PROGRAMS = 512
_FEW_SEGMENTS, _SEGMENTS_MAX = 8, 64
# Fewer keys than this are not worth a program of their own.
_SEGMENT_KEYS = 128
# Programs that are enough by their number still wait for the longest: those rows are cut, coarsely.
_LONG_SEGMENTS_MAX, _LONG_SEGMENT_KEYS = 8, 8192


@dataclass(frozen=True, slots=True)
class Split:
    """Into how many segments a row's keys are cut at most, and how many keys each has at least."""

    segments: int
    keys_min: int


def split(rows: int, programs_a_row: int, keys_max: int) -> Split:
    """keys_max: of one row, as its line of the table (or the sliding window) has room for."""
    few = min(_PROGRAMS // (rows * programs_a_row), _SEGMENTS_MAX, _blocks(keys_max, _SEGMENT_KEYS))
    if few > 1:
        return Split(few, _SEGMENT_KEYS)
    long = min(keys_max // _LONG_SEGMENT_KEYS, _LONG_SEGMENTS_MAX)
    return Split(max(long, 1), _LONG_SEGMENT_KEYS)


def join_size(segments: int) -> int:
    """For how many segments the join is compiled that is to join these."""
    return _FEW_SEGMENTS if segments <= _FEW_SEGMENTS else _SEGMENTS_MAX


def decode_scratch(rows_max: int, heads: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Room for the segments' results of any batch of up to `rows_max` rows."""
    row_segments = max(_PROGRAMS, rows_max * _LONG_SEGMENTS_MAX)
    return torch.empty(row_segments * heads * (head_dim + 2), dtype=torch.float32, device=device)


def decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """One query a row, at the row's last position; fills `out`.

    q, out: [rows, heads, head_dim], contiguous in head_dim. table: [rows, pages_max] int32.
    lengths: [rows] int32, keys of each row, its own token's included; 0 (padding) gives zeros.
    window: how many tokens, itself included, a token sees. scratch: see `decode_scratch`.
    What is launched depends on shapes, never on lengths.
    """
    rows, heads, head_dim = q.shape
    kv_heads, page_tokens = _check(q, keys, values, table, out)
    group = heads // kv_heads
    tile = _DECODE[q.element_size(), _padded(head_dim)]
    programs = kv_heads * _blocks(group, tile.queries)
    keys_max = table.shape[1] * page_tokens
    if window is not None:
        keys_max = min(keys_max, window + tile.keys)
    cut = split(rows, programs, keys_max)
    parts = rows * heads * cut.segments
    if cut.segments > 1:
        assert scratch.dtype == torch.float32 and scratch.is_contiguous()
        assert scratch.numel() >= parts * (head_dim + 2), "scratch of fewer rows"
    # Sums of head_dim values, then of weights, then the maxima they are relative to.
    mixed, totals, peaks = scratch, scratch[parts * head_dim :], scratch[parts * (head_dim + 1) :]
    inner, cap = _scales(scale, softcap)
    shared = {
        "WINDOW": window,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _padded(head_dim),
        "BLOCK_N": tile.keys,
    }
    decode_kernel[programs, rows, cut.segments](
        q,
        keys,
        values,
        table,
        lengths,
        out,
        mixed,
        totals,
        peaks,
        inner,
        cut.keys_min,
        table.stride(0),
        *q.stride()[:2],
        *out.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        CAP=cap,
        GROUP=group,
        BLOCK_M=tile.queries,
        PAGE=page_tokens,
        **shared,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if cut.segments > 1:
        join_kernel[heads, rows](
            lengths,
            out,
            mixed,
            totals,
            peaks,
            cut.segments,
            cut.keys_min,
            *out.stride()[:2],
            **shared,
            BLOCK_S=join_size(cut.segments),
            num_warps=4,
        )


def prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    queries_max: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """A chunk of queries a row, the last ones of its keys, causal; fills `out`.

    q, out: [tokens, heads, head_dim], rows one behind another, contiguous in head_dim.
    starts: [rows + 1] int32, where each row's queries begin. lengths: [rows] int32, keys of each
    row, this chunk's included. queries_max: of the longest chunk. Reads nothing back from the
    device.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, page_tokens = _check(q, keys, values, table, out)
    paging = None if softcap else paging_varlen(q)
    if paging is not None:
        # It takes any strides, in the order [pages, page_tokens, kv_heads, head_dim].
        paging(
            out,
            q,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            starts,
            None,
            queries_max,
            table.shape[1] * page_tokens,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=lengths,
            block_table=table,
        )
        return
    rows = starts.shape[0] - 1
    group = heads // kv_heads
    tile = prefill_tile(q.element_size(), _padded(head_dim), tokens, heads, queries_max * group)
    packed = min(group, tile.queries)
    block_tokens = tile.queries // packed
    inner, cap = _scales(scale, softcap)
    # Rows fill whole blocks, so there are never more than this; those too many end at once.
    prefill_kernel[kv_heads * _blocks(group, packed), tokens // block_tokens + rows](
        q,
        keys,
        values,
        table,
        starts,
        lengths,
        out,
        inner,
        rows,
        table.stride(0),
        *q.stride()[:2],
        *out.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        CAP=cap,
        WINDOW=window,
        GROUP=group,
        PACKED=packed,
        BLOCK_TOKENS=block_tokens,
        BLOCK_M=tile.queries,
        HEAD_DIM=head_dim,
        BLOCK_D=_padded(head_dim),
        BLOCK_N=tile.keys,
        PAGE=page_tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def paging_varlen(q: torch.Tensor) -> Callable[..., object] | None:
    """torch's own attention, where it can read pages and take this query; None elsewhere.

    torch 2.13 has the parameters, but the FlashAttention 2 that it ships refuses them: whoever has
    package `flash_attn_interface` calls `torch.nn.attention.activate_flash_attention_impl("FA3")`
    before. It does not pass on a softcap.
    """
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active != "FA3" or not q.is_cuda or q.element_size() != 2:
        return None
    varlen = importlib.import_module("torch.nn.attention.varlen")
    attend: Callable[..., object] | None = getattr(varlen, "varlen_attn_out", None)
    if attend is None or "block_table" not in inspect.signature(attend).parameters:
        return None
    return attend


def prefill_tile(
    element_size: int, block_d: int, tokens: int, heads: int, chunk_rows_max: int
) -> Tile:
    large = _PREFILL[element_size, block_d]
    small = _PREFILL_SMALL[element_size, block_d]
    idle = tokens * heads < _MULTIPROCESSORS * large.queries
    return small if idle or chunk_rows_max <= small.queries else large


def _check(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> tuple[int, int]:
    _, kv_heads, page_tokens, head_dim = keys.shape
    assert keys.shape == values.shape and q.shape == out.shape and q.shape[2] == head_dim
    assert q.shape[1] % kv_heads == 0 and head_dim <= 256
    assert page_tokens & (page_tokens - 1) == 0, "page_tokens is a power of two"
    assert all(tensor.stride(-1) == 1 for tensor in (q, keys, values, table, out))
    return kv_heads, page_tokens


def _scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """What a product is multiplied by at once, and after tanh if there is one, for powers of 2."""
    if softcap is None:
        return scale * _LOG2E, None
    return scale / softcap, softcap * _LOG2E


def _padded(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())


def _blocks(count: int, size: int) -> int:
    return -(-count // size)
