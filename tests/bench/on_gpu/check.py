"""Every kernel on the device against the reference in float32, by relative error.

Inputs are drawn anew for each case and outputs filled with NaN before, so that what was not written
shows. The same inputs must give the same bits twice. Some inputs are integers that are exact in
every dtype: there a single wrong bit shows (triton #9433: on Hopper, matmuls whose left operand
lies in registers gave wrong sums before ptxas 13.3).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch

from replica.model.shape import ModelShape
from tests.bench.on_gpu import check_attention, check_fused, check_lora, check_model
from tests.bench.on_gpu.cases import Case, farthest, relative
from tests.bench.on_gpu.inputs import Draw
from tests.bench.on_gpu.setting import Setting

SECTION = "check"
# Where a kernel lets Triton do so, products of fp32 operands are rounded to tf32 on the way.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}


def run(setting: Setting) -> None:
    # The interpreter is wrong on bf16.
    dtypes = [torch.float32, torch.float16] if setting.tiny else list(TOLERANCE)
    if setting.dtypes:
        dtypes = [getattr(torch, name) for name in setting.dtypes]
    names = setting.kernels or [*FAMILIES, ENGINE]
    with torch.inference_mode():
        for dtype, name in product(dtypes, [name for name in names if name != ENGINE]):
            _check_family(setting, name, dtype)
    if ENGINE in names and torch.float32 in dtypes and setting.has_time(SECTION, ENGINE):
        check_model.run(setting)


Family = Callable[[Draw, ModelShape, bool], Iterable[Case]]


def _norms(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Case]:
    for rows, hidden in product(_rows(tiny), (16, 24) if tiny else (4096, 768, 5120)):
        yield from check_fused.norms(draw, rows, hidden)


def _gated(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Case]:
    for rows, inner in product(_rows(tiny), (16, 24) if tiny else (14336, 4864, 100)):
        yield check_fused.gated(draw, rows, inner)


def _sampling(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Case]:
    return (check_fused.sampling(draw, rows, 300 if tiny else 128256) for rows in (1, 33))


def _rows(tiny: bool) -> Sequence[int]:
    return (1, 3) if tiny else (1, 3, 67)


FAMILIES: Mapping[str, tuple[str, Family]] = {
    "integers": ("attention, integers", lambda d, s, tiny: check_attention.integers(d, tiny)),
    "lora-integers": ("LoRA, integers", check_lora.integers),
    "norms": ("norms", _norms),
    "rotary": ("rotary and store", lambda d, s, tiny: check_fused.rotary(d, tiny)),
    "gated": ("gated activation", _gated),
    "sampling": ("sampling", _sampling),
    "decode": ("attention, decode", lambda d, s, tiny: check_attention.decodes(d, tiny)),
    "prefill": ("attention, prefill", lambda d, s, tiny: check_attention.prefills(d, tiny)),
    "lora": ("LoRA", check_lora.cases),
    "lora-replayed": ("LoRA, replayed", check_lora.replayed),
}
"""By the name to ask for it: what it is called, and its cases."""
ENGINE = "engine"


def _check_family(setting: Setting, family: str, dtype: torch.dtype) -> None:
    title, cases = FAMILIES[family]
    name = f"{title} {str(dtype).removeprefix('torch.')}"

    def check() -> None:
        draw = Draw(setting.seed, setting.device, dtype)
        _check(setting, name, cases(draw, setting.shape, setting.tiny), TOLERANCE[dtype])

    setting.attempt(SECTION, name, check)


def _check(setting: Setting, name: str, cases: Iterable[Case], tolerance: float) -> None:
    """The worst of all cases goes into the short table, also where one of them raises."""
    worst, where, most = 0.0, "", tolerance
    try:
        for case in cases:
            if where and not setting.has_time(SECTION, f"{name}, {case.name} and the rest"):
                break
            found, again, wanted = case.run(), case.run(), case.wanted()
            same = torch.equal(found, again)
            # A moving error is no error that a tolerance is for.
            error = relative(found, wanted) if same else float("nan")
            largest = farthest(found, wanted)
            most = 0.0 if case.exact else tolerance
            if not where or not error <= worst:
                worst, where = error, case.name
            setting.report.add(
                SECTION,
                f"{name}, {case.name}",
                error,
                most=most,
                beside=f"largest {largest:.1e}" + ("" if same else ", DIFFERENT the second time"),
                short=False,
                largest=largest,
                deterministic=same,
            )
    finally:
        if where:
            setting.report.add(
                SECTION, f"{name}, worst relative error", worst, most=most, beside=where
            )
