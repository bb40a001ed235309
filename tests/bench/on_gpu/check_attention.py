"""Paged attention against the reference: GQA, ragged rows, windows, softcap, and by integers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_kernels import attention, reference
from tests.bench.on_gpu.cases import Case
from tests.bench.on_gpu.inputs import Draw, Heads, Paged, one_hot

_LLAMA = Heads(32, 8, 128)


@dataclass(frozen=True, slots=True)
class Attended:
    """rows: (queries, keys, the queries' own included) of each."""

    heads: Heads
    rows: list[tuple[int, int]]
    window: int | None = None
    softcap: float | None = None

    @property
    def name(self) -> str:
        rows = f"{len(self.rows)} rows" if len(self.rows) > 5 else str(self.rows)
        name = f"{rows} of {self.heads.heads}/{self.heads.kv_heads} heads of {self.heads.head_dim}"
        name += f", window {self.window}" if self.window is not None else ""
        return name + (f", softcap {self.softcap:g}" if self.softcap is not None else "")


def _single(*lengths: int) -> list[tuple[int, int]]:
    return [(1, length) for length in lengths]


_DECODES = (
    Attended(_LLAMA, _single(*[1024] * 64)),
    Attended(_LLAMA, _single(8192)),
    Attended(_LLAMA, _single(1, 16, 17, 1000, 4097)),
    Attended(_LLAMA, _single(1, 300, 2000), window=256),
    Attended(_LLAMA, _single(5, 700), softcap=30.0),
    Attended(Heads(8, 8, 64), _single(3, 129, 640)),
    Attended(Heads(28, 4, 128), _single(33, 900)),
    Attended(Heads(16, 2, 256), _single(65, 300), window=100, softcap=20.0),
)
_PREFILLS = (
    Attended(_LLAMA, [(2048, 2048)]),
    Attended(_LLAMA, [(1, 1), (5, 700), (129, 129), (700, 1500)]),
    Attended(_LLAMA, [(300, 1000), (64, 64)], window=128),
    Attended(_LLAMA, [(100, 333)], softcap=30.0),
    Attended(Heads(8, 8, 64), [(33, 65), (130, 130)]),
    Attended(Heads(28, 4, 128), [(17, 400), (90, 90)]),
    Attended(Heads(16, 2, 256), [(70, 170)], window=100, softcap=20.0),
)
_TINY_DECODES = (
    Attended(Heads(4, 1, 16), _single(1, 20)),
    Attended(Heads(2, 2, 16), _single(33), window=16, softcap=5.0),
)
_TINY_PREFILLS = (
    Attended(Heads(4, 1, 16), [(3, 20), (5, 5)]),
    Attended(Heads(2, 2, 16), [(7, 30)], window=16, softcap=5.0),
)
_INTEGERS = ([(2048, 2048)], [(700, 1500), (129, 129), (64, 900)])
_TINY_INTEGERS = ([(5, 20)],)


def decodes(draw: Draw, tiny: bool) -> Iterator[Case]:
    return (_decode(draw, attended) for attended in (_TINY_DECODES if tiny else _DECODES))


def prefills(draw: Draw, tiny: bool) -> Iterator[Case]:
    return (_prefill(draw, attended) for attended in (_TINY_PREFILLS if tiny else _PREFILLS))


def integers(draw: Draw, tiny: bool) -> Iterator[Case]:
    """Each query sees one key alone: all sums are exact."""
    heads = Heads(4, 2, 64) if tiny else _LLAMA
    return (_one_hot(draw, heads, rows) for rows in (_TINY_INTEGERS if tiny else _INTEGERS))


def _decode(draw: Draw, attended: Attended) -> Case:
    p, heads = draw.paged(attended.heads, attended.rows), attended.heads
    scratch = attention.decode_scratch(len(p.rows), heads.heads, heads.head_dim, draw.device)

    def run() -> torch.Tensor:
        out = torch.full_like(p.q, float("nan"))
        attention.decode(
            p.q,
            p.keys,
            p.values,
            p.table,
            p.lengths,
            p.scale,
            attended.window,
            attended.softcap,
            out,
            scratch,
        )
        return out

    return Case(attended.name, run, lambda: _wanted(p, attended))


def _prefill(draw: Draw, attended: Attended) -> Case:
    p = draw.paged(attended.heads, attended.rows)
    return Case(
        attended.name,
        lambda: _prefilled(p, p.scale, attended),
        lambda: _wanted(p, attended),
    )


def _one_hot(draw: Draw, heads: Heads, rows: list[tuple[int, int]]) -> Case:
    attended = Attended(heads, rows)
    p = draw.paged(heads, rows)
    wanted = one_hot(p, draw)
    return Case(attended.name, lambda: _prefilled(p, 1.0, attended), lambda: wanted, exact=True)


def _prefilled(p: Paged, scale: float, attended: Attended) -> torch.Tensor:
    out = torch.full_like(p.q, float("nan"))
    attention.prefill(
        p.q,
        p.keys,
        p.values,
        p.table,
        p.starts,
        p.lengths,
        p.queries_max,
        scale,
        attended.window,
        attended.softcap,
        out,
    )
    return out


def _wanted(p: Paged, attended: Attended) -> torch.Tensor:
    return reference.attention(
        p.q.float(),
        p.keys.float(),
        p.values.float(),
        p.table,
        p.starts,
        p.lengths,
        p.scale,
        attended.window,
        attended.softcap,
    )
