"""Triton: what lies between the matmuls in one launch each: norms, rotary with the KV store, gated
activation, the choice of tokens.

All compute in float32 and round once to the type of what they write, as torch's own do. Each is
tested against its namesake in `reference.py`.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.launching import Launcher

# Heads a program turns: few where there are few tokens, so that every multiprocessor has work.
_HEADS_FEW, _HEADS_MANY = 4, 16
_TOKENS_FEW = 256
_GATED_BLOCK = 1024
# Of the vocabulary, what one program surveys.
_CHOICE_BLOCK = 2048


def _power_of_2(size: int) -> int:
    """From `size` on. Triton's own function of this takes the host as long as half a launch."""
    return 1 << (size - 1).bit_length()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [rows, hidden], rows apart by any stride. A new tensor."""
    return _norm(x, None, weight, eps, 1.0)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: float = 1.0,
) -> torch.Tensor:
    """Adds x · scale to `residual` in place (rounded to its type) and gives the norm of that.

    A kernel is compiled for each scale.
    """
    return _norm(x, residual, weight, eps, scale)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scale: float,
) -> torch.Tensor:
    rows, hidden = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    assert residual is None or (residual.stride(1) == 1 and residual.dtype == x.dtype)
    out = x.new_empty(rows, hidden)
    if rows:
        block = _power_of_2(hidden)
        held = x if residual is None else residual
        _norm_kernel[(rows,)](
            x,
            held,
            weight,
            out,
            x.stride(0),
            held.stride(0),
            eps,
            hidden,
            BLOCK=block,
            ADDS=residual is not None,
            SCALE=scale,
            num_warps=min(max(block // 512, 1), 16),
        )
    return out


@Launcher
@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    eps,
    hidden,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        values *= SCALE
    if ADDS:
        place = residual + row * residual_stride + columns
        values += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / hidden + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = values * scale * gain
    tl.store(out + row * hidden + columns, normed.to(out.dtype.element_ty), mask=inside)


def rotary_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    targets: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turns the queries in `qkv` in place; turned keys, and values as they are, go to the cache.

    qkv: [tokens, heads + 2 · kv_heads, head_dim]; what it holds of keys and values stays.
    positions, targets: [tokens], integers; targets: page · page_tokens + offset.
    cos, sin: [context, head_dim], sin with its first half negated.
    keys, values: [pages, kv_heads, page_tokens, head_dim], of any strides but the last.
    query_norm, key_norm: [head_dim]; where there are any, heads are normed before they turn.
    """
    tokens, all_heads, size = qkv.shape
    _, kv_heads, page_tokens, _ = keys.shape
    strides = keys.stride()
    assert strides == values.stride() and keys.shape == values.shape
    assert qkv.stride(2) == strides[3] == 1
    assert cos.is_contiguous() and sin.is_contiguous() and size % 2 == 0
    assert (query_norm is None) == (key_norm is None)
    if not tokens:
        return
    heads = _HEADS_FEW if tokens <= _TOKENS_FEW else _HEADS_MANY
    _rotary_kernel[tokens, -(-all_heads // heads)](
        qkv,
        positions,
        cos,
        sin,
        keys,
        values,
        targets,
        cos if query_norm is None else query_norm,
        cos if key_norm is None else key_norm,
        eps,
        qkv.stride(0),
        qkv.stride(1),
        *strides[:3],
        all_heads - 2 * kv_heads,
        kv_heads,
        page_tokens,
        HALF=size // 2,
        BLOCK=_power_of_2(size // 2),
        HEADS=heads,
        NORMS=query_norm is not None,
        num_warps=1 if heads == _HEADS_FEW else 4,
    )


# Whoever packs a step's numbers into one tensor passes views at any offset: no variant for each.
@Launcher
@triton.jit(do_not_specialize_on_alignment=["positions", "targets"])
def _rotary_kernel(  # type: ignore[no-untyped-def]
    qkv,
    positions,
    cos,
    sin,
    keys,
    values,
    targets,
    query_norm,
    key_norm,
    eps,
    token_stride,
    head_stride,
    page_stride,
    cache_head_stride,
    offset_stride,
    query_heads,
    kv_heads,
    page_tokens,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NORMS: tl.constexpr,
):
    # Both halves of a head are tensors of one shape, so that each thread writes, in place, only
    # what it alone has read.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (column < HALF) & (head < query_heads + 2 * kv_heads)
    is_query = head < query_heads
    is_value = head >= query_heads + kv_heads
    dtype = qkv.dtype.element_ty

    place = qkv + token * token_stride + head * head_stride + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    low, high = first, second
    if NORMS:
        squares = tl.sum(low * low + high * high, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        wide = column < HALF
        query_low = tl.load(query_norm + column, mask=wide, other=0.0).to(tl.float32)
        query_high = tl.load(query_norm + HALF + column, mask=wide, other=0.0).to(tl.float32)
        key_low = tl.load(key_norm + column, mask=wide, other=0.0).to(tl.float32)
        key_high = tl.load(key_norm + HALF + column, mask=wide, other=0.0).to(tl.float32)
        low = low * scale * tl.where(is_query, query_low, key_low)
        high = high * scale * tl.where(is_query, query_high, key_high)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)

    turn = tl.load(positions + token).to(tl.int64) * (2 * HALF) + column
    narrow = column < HALF
    cos_low = tl.load(cos + turn, mask=narrow, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + turn + HALF, mask=narrow, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + turn, mask=narrow, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + turn + HALF, mask=narrow, other=0.0).to(tl.float32)
    turned_low = (low * cos_low + high * sin_low).to(dtype)
    turned_high = (high * cos_high + low * sin_high).to(dtype)
    tl.store(place, turned_low, mask=inside & is_query)
    tl.store(place + HALF, turned_high, mask=inside & is_query)

    target = tl.load(targets + token).to(tl.int64)
    row = (target // page_tokens) * page_stride + (target % page_tokens) * offset_stride
    is_key = (head >= query_heads) & (head < query_heads + kv_heads)
    key = keys + row + (head - query_heads).to(tl.int64) * cache_head_stride + column
    tl.store(key, turned_low, mask=inside & is_key)
    tl.store(key + HALF, turned_high, mask=inside & is_key)
    own = (head - query_heads - kv_heads).to(tl.int64)
    value = values + row + own * cache_head_stride + column
    tl.store(value, first.to(dtype), mask=inside & is_value)
    tl.store(value + HALF, second.to(dtype), mask=inside & is_value)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2 · inner], gates then ups → [rows, inner], a new tensor."""
    return _gated(gate_up, False)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul`, by GELU in its approximation with tanh."""
    return _gated(gate_up, True)


def _gated(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = gate_up.new_empty(rows, inner)
    if rows:
        _gated_kernel[rows, -(-inner // _GATED_BLOCK)](
            gate_up, out, gate_up.stride(0), inner, BLOCK=_GATED_BLOCK, GELU=gelu, num_warps=4
        )
    return out


@Launcher
@triton.jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate_up, out, stride, inner, BLOCK: tl.constexpr, GELU: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + inner + column, mask=inside, other=0.0).to(tl.float32)
    gated = activated(gate, GELU) * up
    tl.store(out + row * inner + column, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activated(gate, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU, or GELU with tanh: (1 + tanh(z / 2)) / 2 is sigmoid(z)."""
    z = gate
    if GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 · √(2 / π)
        z = tl.maximum(z, -80.0)  # `exp` of more than 88 is infinite
    return gate * tl.sigmoid(z)


def choose(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64 [rows, 2]: a token a row, and 1 where the row's logits are finite, else 0. Nothing is
    read back, and equal inputs give equal tokens.

    logits: [rows, vocab]. temperature, uniform: float32 [rows]. Where the temperature is 0 the
    first of the largest; else the token in whose share of softmax(logits / temperature) `uniform`,
    a number in [0, 1), lies: never one of probability 0. A row that has NaN or +inf, or only -inf,
    is not finite; it gives any token.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and temperature.is_contiguous() and uniform.is_contiguous()
    out = torch.empty((rows, 2), dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    blocks = -(-vocab // _CHOICE_BLOCK)
    best = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    first = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    share = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    _survey_kernel[(rows, blocks)](
        logits,
        temperature,
        best,
        first,
        share,
        logits.stride(0),
        vocab,
        blocks,
        BLOCK=_CHOICE_BLOCK,
        num_warps=4,
    )
    _pick_kernel[(rows,)](
        logits,
        temperature,
        uniform,
        best,
        first,
        share,
        out,
        logits.stride(0),
        vocab,
        blocks,
        BLOCK=_CHOICE_BLOCK,
        BLOCKS=_power_of_2(blocks),
        num_warps=4,
    )
    return out


@Launcher
@triton.jit(do_not_specialize_on_alignment=["temperature"])
def _survey_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, best, first, share, stride, vocab, blocks, BLOCK: tl.constexpr
):
    """Of one block of one row: the largest, the first that is, the sum of what each weighs
    against the largest.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    held = tl.load(logits + row * stride + token, mask=inside, other=float("-inf"))
    held = held.to(tl.float32)
    most = tl.max(held)
    heat = tl.load(temperature + row)
    heat = tl.where(heat > 0, heat, 1.0)
    weights = tl.exp((held - _above(most)) / heat)
    tl.store(best + row * blocks + block, most)
    tl.store(first + row * blocks + block, tl.min(tl.where(held == most, token, vocab)))
    tl.store(share + row * blocks + block, tl.sum(weights))


@Launcher
@triton.jit(do_not_specialize_on_alignment=["temperature", "uniform"])
def _pick_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    uniform,
    best,
    first,
    share,
    out,
    stride,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The block in which the share lies, then the token within it. NaN and +inf make a share NaN,
    and `max` ignores NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    there = block < blocks
    bests = tl.load(best + row * blocks + block, mask=there, other=float("-inf"))
    firsts = tl.load(first + row * blocks + block, mask=there, other=vocab)
    most = tl.max(bests)
    heat = tl.load(temperature + row)
    token = tl.min(tl.where(bests == most, firsts, vocab))
    shares = tl.load(share + row * blocks + block, mask=there, other=0.0)
    finite = tl.sum(shares) > 0
    if heat > 0:
        shares = shares * tl.exp((bests - _above(most)) / heat)
        chosen, within = _find(shares, tl.load(uniform + row), block, BLOCKS)
        mine = chosen * BLOCK + tl.arange(0, BLOCK)
        held = tl.load(logits + row * stride + mine, mask=mine < vocab, other=float("-inf")).to(
            tl.float32
        )
        weights = tl.exp((held - _above(tl.max(held))) / heat)
        index, _ = _find(weights, within, tl.arange(0, BLOCK), BLOCK)
        token = chosen * BLOCK + index
    tl.store(out + 2 * row, tl.minimum(token, vocab - 1).to(tl.int64))
    tl.store(out + 2 * row + 1, finite.to(tl.int64))


@triton.jit
def _above(most):  # type: ignore[no-untyped-def]
    """What to subtract before `exp`: all may be ruled out, and -inf less itself is no number."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def _find(weights, fraction, index, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first whose share, of all shares in a row, reaches beyond `fraction`, and where in its
    share that lies. A scan in parallel rounds differently from place to place, so what weighs
    nothing is ruled out by itself, and where none is found it is the last that weighs anything.
    """
    ends = tl.cumsum(weights, 0)
    target = fraction * tl.sum(weights)
    found = tl.min(tl.where((ends > target) & (weights > 0), index, SIZE))
    last = tl.max(tl.where(weights > 0, index, 0))
    found = tl.where(found < SIZE, found, last)
    before = tl.sum(tl.where(index < found, weights, 0.0))
    own = tl.sum(tl.where(index == found, weights, 0.0))
    within = tl.where(own > 0, (target - before) / own, 0.0)
    return found, tl.minimum(tl.maximum(within, 0.0), 1.0)
