"""Norms, rotary and store, gated activation and sampling against the reference."""

from collections.abc import Callable, Iterator
from itertools import product

import torch

from lora_kernels import fused, reference
from tests.bench.on_gpu.cases import Case
from tests.bench.on_gpu.inputs import LAYERS, PAGE_TOKENS, Draw, Heads

_EPS = 1e-5
_POSITIONS = 512


def norms(draw: Draw, rows: int, hidden: int) -> Iterator[Case]:
    x, weight = draw.normal(rows, hidden), draw.normal(hidden)
    residual = draw.normal(rows, hidden)
    yield Case(
        f"{rows} × {hidden}",
        lambda: fused.rms_norm(x, weight, _EPS),
        lambda: reference.rms_norm(x.float(), weight.float(), _EPS),
    )

    def added() -> torch.Tensor:
        own = residual.clone()
        return torch.cat([fused.add_rms_norm(x, own, weight, _EPS), own])

    def wanted() -> torch.Tensor:
        own = residual.float()
        return torch.cat([reference.add_rms_norm(x.float(), own, weight.float(), _EPS), own])

    yield Case(f"{rows} × {hidden}, added", added, wanted)


def rotary(draw: Draw, tiny: bool) -> Iterator[Case]:
    shapes = [Heads(2, 1, 16)] if tiny else [Heads(32, 8, 128), Heads(14, 2, 64), Heads(5, 5, 96)]
    for heads, tokens, normed in product(shapes, (1, 37), (False, True)):
        yield _rotary(draw, heads, tokens, normed)


def _rotary(draw: Draw, heads: Heads, tokens: int, normed: bool) -> Case:
    size, pages = heads.head_dim, 9
    qkv = draw.normal(tokens, heads.heads + 2 * heads.kv_heads, size)
    angles = torch.arange(_POSITIONS, device=draw.device)[:, None] * draw.uniform(size // 2)
    cos = torch.cat([angles.cos(), angles.cos()], 1).to(draw.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], 1).to(draw.dtype)
    positions = draw.indices(_POSITIONS, tokens).int()
    targets = draw.order(pages * PAGE_TOKENS)[:tokens].int()
    weights = [draw.normal(size), draw.normal(size)] if normed else [None, None]

    def run(kernel: Callable[..., None], dtype: torch.dtype) -> torch.Tensor:
        own = qkv.to(dtype, copy=True)
        cache = own.new_zeros(pages, LAYERS, 2, heads.kv_heads, PAGE_TOKENS, size)
        keys, values = cache[:, 1, 0], cache[:, 1, 1]
        scales = [None if weight is None else weight.to(dtype) for weight in weights]
        kernel(own, positions, cos.to(dtype), sin.to(dtype), keys, values, targets, *scales, _EPS)
        return torch.cat([own[:, : heads.heads].flatten(), cache.flatten()])

    name = f"{tokens} tokens of {heads.heads}/{heads.kv_heads} heads of {size}"
    return Case(
        name + (", normed" if normed else ""),
        lambda: run(fused.rotary_store, draw.dtype),
        lambda: run(reference.rotary_store, torch.float32),
    )


def gated(draw: Draw, rows: int, inner: int) -> Case:
    x = draw.normal(rows, 2 * inner)
    return Case(
        f"{rows} × {inner}",
        lambda: fused.silu_mul(x),
        lambda: reference.silu_mul(x.float()),
    )


def sampling(draw: Draw, rows: int, vocab: int) -> Case:
    """Of a draw, how far `uniform` lies outside the share of the token that was chosen; 1 for a
    token that should have been the first of the most probable and is not.
    """
    logits, uniform = draw.normal(rows, vocab).mul_(3), draw.uniform(rows)
    greedy = draw.uniform(rows) < 0.3 if rows > 1 else torch.ones_like(uniform, dtype=torch.bool)
    temperature = torch.where(greedy, 0.0, draw.uniform(rows) + 0.5)
    heat = torch.where(greedy, 1.0, temperature).double()
    ends = (logits.double() / heat[:, None]).softmax(-1).cumsum(-1)
    largest = logits == logits.max(-1, keepdim=True).values
    tokens = torch.arange(vocab, device=draw.device)
    first = torch.where(largest, tokens, vocab).min(-1).values

    def missed() -> torch.Tensor:
        chosen, finite = fused.choose(logits, temperature, uniform).unbind(1)
        assert finite.all()
        end = ends.gather(1, chosen[:, None])[:, 0]
        begin = ends.gather(1, (chosen - 1).clamp(min=0)[:, None])[:, 0]
        begin = torch.where(chosen == 0, 0.0, begin)
        outside = torch.maximum(begin - uniform, uniform - end).clamp(min=0)
        wrong = (chosen != first).double()
        return 1 + torch.where(greedy, wrong, outside)

    return Case(f"{rows} × {vocab}", missed, lambda: torch.ones_like(ends[:, 0]))
