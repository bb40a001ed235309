"""The Triton kernels of `attention`: what one program computes.

Softmax runs over blocks of keys with a running maximum (FlashAttention, arXiv 2205.14135), in fp32
and powers of two. Offsets into the cache are 64-bit.
"""

import triton
import triton.language as tl

from lora_kernels.launching import Launcher


@Launcher
@triton.jit(
    do_not_specialize=["keys_min", "table_row"],
    do_not_specialize_on_alignment=["table", "lengths", "totals", "peaks"],
)
def decode_kernel(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    table,
    lengths,
    out,
    mixed,
    totals,
    peaks,
    scale,
    keys_min,
    table_row,
    q_row,
    q_head,
    out_row,
    out_head,
    key_page,
    key_head,
    key_token,
    value_page,
    value_head,
    value_token,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    row = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    length = tl.load(lengths + row)
    low, size = _segment(length, segments, keys_min, WINDOW, BLOCK_N)
    begin = low + segment * size
    if (segment > 0) & (begin >= length):
        return
    end = tl.minimum(begin + size, length)

    packed = tl.program_id(0) % HEAD_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + packed
    mask = (packed < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    queries = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=mask, other=0.0)
    acc, total, peak = _attend(
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        queries,
        tl.zeros([BLOCK_M], tl.int32) + (length - 1),
        begin,
        end,
        low,
        length,
        keys + kv_head.to(tl.int64) * key_head,
        values + kv_head.to(tl.int64) * value_head,
        table + row * table_row,
        key_page,
        key_token,
        value_page,
        value_token,
        scale,
        CAP,
        WINDOW,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        PAGE,
        True,
    )
    if (segment == 0) & (end >= length):
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at = out + row * out_row + heads[:, None] * out_head + d[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
    else:
        heads_all = tl.num_programs(0) // HEAD_BLOCKS * GROUP
        part = (row * heads_all + heads) * segments + segment
        tl.store(mixed + part[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.store(totals + part, total, mask=packed < GROUP)
        tl.store(peaks + part, peak, mask=packed < GROUP)


@Launcher
@triton.jit(
    do_not_specialize=["segments", "keys_min"],
    do_not_specialize_on_alignment=["lengths", "totals", "peaks"],
)
def join_kernel(  # type: ignore[no-untyped-def]
    lengths,
    out,
    mixed,
    totals,
    peaks,
    segments,
    keys_min,
    out_row,
    out_head,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One head of one row: the segments' sums, each weighted by what its maximum is short of."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    low, size = _segment(length, segments, keys_min, WINDOW, BLOCK_N)
    # One segment alone has written to `out` itself.
    if length - low <= size:
        return
    segment = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    used = low + segment * size < length
    part = (row * tl.num_programs(0) + head) * segments + segment
    peak = tl.load(peaks + part, mask=used, other=float("-inf"))
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(weight * tl.load(totals + part, mask=used, other=0.0), 0)
    mask = used[:, None] & (d < HEAD_DIM)[None, :]
    sums = tl.load(mixed + part[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    joined = tl.sum(weight[:, None] * sums, 0) / total
    at = out + row * out_row + head * out_head + d
    tl.store(at, joined.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def _segment(  # type: ignore[no-untyped-def]
    length, segments, keys_min, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The first key that is seen, and how many keys a segment has, in whole blocks."""
    low = tl.maximum(length - WINDOW, 0) if WINDOW is not None else length * 0
    size = tl.maximum(tl.cdiv(length - low, segments), keys_min)
    return low, tl.cdiv(size, BLOCK_N) * BLOCK_N


@Launcher
@triton.jit(
    do_not_specialize=["rows", "table_row"],
    do_not_specialize_on_alignment=["table", "starts", "lengths"],
)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    table,
    starts,
    lengths,
    out,
    scale,
    rows,
    table_row,
    q_row,
    q_head,
    out_row,
    out_head,
    key_page,
    key_head,
    key_token,
    value_page,
    value_head,
    value_token,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    HEAD_BLOCKS: tl.constexpr = (GROUP + PACKED - 1) // PACKED
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    # The last blocks of a chunk see the most keys: those first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    row = _row_of(block, starts, rows, BLOCK_TOKENS)
    start = tl.load(starts + row)
    chunk = tl.load(starts + row + 1) - start
    first = (block - (start // BLOCK_TOKENS + row)) * BLOCK_TOKENS
    if first >= chunk:
        return
    length = tl.load(lengths + row)
    context = length - chunk

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = first + m // PACKED
    packed = tl.program_id(0) % HEAD_BLOCKS * PACKED + m % PACKED
    real = (m // PACKED < BLOCK_TOKENS) & (token < chunk) & (packed < GROUP)
    mask = real[:, None] & (d < HEAD_DIM)[None, :]
    line = (start + token).to(tl.int64)
    heads = kv_head * GROUP + packed
    at = q + line[:, None] * q_row + heads[:, None] * q_head + d[None, :]
    queries = tl.load(at, mask=mask, other=0.0)

    # Keys [low, high) are seen by some query of the block, [inner, outer) by each of them.
    high = context + tl.minimum(first + BLOCK_TOKENS, chunk)
    outer = tl.maximum(context + first + 1, 0) // BLOCK_N * BLOCK_N
    low = 0
    inner = 0
    if WINDOW is not None:
        low = tl.maximum(context + first + 1 - WINDOW, 0)
        inner = tl.cdiv(tl.maximum(high - WINDOW, 0), BLOCK_N) * BLOCK_N
        outer = tl.maximum(outer, inner)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    key_base = keys + kv_head.to(tl.int64) * key_head
    value_base = values + kv_head.to(tl.int64) * value_head
    pages = table + row.to(tl.int64) * table_row
    for part in tl.static_range(0 if WINDOW is not None else 1, 3):
        if part == 0:
            begin = low // BLOCK_N * BLOCK_N
            end = tl.minimum(inner, high)
        elif part == 1:
            begin = inner
            end = outer
        else:
            begin = outer
            end = high
        acc, total, peak = _attend(
            acc,
            total,
            peak,
            queries,
            context + token,
            begin,
            end,
            low,
            high,
            key_base,
            value_base,
            pages,
            key_page,
            key_token,
            value_page,
            value_token,
            scale,
            CAP,
            WINDOW,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PAGE,
            part != 1,
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = out + line[:, None] * out_row + heads[:, None] * out_head + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row_of(block, starts, rows, BLOCK_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row r has the blocks from starts[r] // BLOCK_TOKENS + r on: never fewer than it needs."""
    row = 0
    beyond = rows
    while beyond - row > 1:
        middle = (row + beyond) // 2
        if tl.load(starts + middle) // BLOCK_TOKENS + middle <= block:
            row = middle
        else:
            beyond = middle
    return row


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    acc,
    total,
    peak,
    queries,
    position,
    begin,
    end,
    low,
    high,
    keys,
    values,
    pages,
    key_page,
    key_token,
    value_page,
    value_token,
    scale,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes in keys [begin, end); unmasked, each query sees all of them and blocks are whole."""
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        if MASKED:
            # Nothing is read outside [low, high): it may be NaN, which a weight of 0 keeps.
            there = (n >= low) & (n < high)
            page = tl.load(pages + n // PAGE, mask=there, other=0).to(tl.int64)
        else:
            there = n >= 0
            page = tl.load(pages + n // PAGE).to(tl.int64)
        key_at = keys + (page * key_page + n % PAGE * key_token)[None, :] + d[:, None]
        value_at = values + (page * value_page + n % PAGE * value_token)[:, None] + d[None, :]
        if MASKED or HEAD_DIM < BLOCK_D:
            k = tl.load(key_at, mask=there[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(value_at, mask=there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(key_at)
            v = tl.load(value_at)
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        if CAP is not None:
            # tanh, which saturates rightly where the power overflows.
            scores = CAP * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
        if MASKED:
            seen = there[None, :] & (n[None, :] <= position[:, None])
            if WINDOW is not None:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, 1))
        # A query that has seen no key yet.
        safe = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(peak - safe)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = raised
    return acc, total, peak
