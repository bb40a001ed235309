"""Every kernel on the device against the reference in float32, by relative error.

Inputs are drawn anew for each case and outputs filled with NaN before, so that what was not written
shows. The same inputs must give the same bits twice. Some inputs are integers that are exact in
every dtype: there a single wrong bit shows (triton #9433: on Hopper, matmuls whose left operand
lies in registers gave wrong sums before ptxas 13.3).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product

import torch

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
    with torch.inference_mode():
        _kernels_in_each(dtypes, setting)
    if torch.float32 in dtypes and setting.has_time(SECTION, "engine"):
        check_model.run(setting)


def _kernels_in_each(dtypes: Sequence[torch.dtype], setting: Setting) -> None:
    for dtype in dtypes:
        draw = Draw(setting.seed, setting.device, dtype)
        for kernel, cases in _kernels(setting, draw):
            name = f"{kernel} {str(dtype).removeprefix('torch.')}"
            if setting.has_time(SECTION, name):
                try:
                    _check(setting, name, cases, TOLERANCE[dtype])
                except Exception as error:
                    # A kernel that does not even compile leaves the others their turn.
                    setting.report.failed(SECTION, name, error)


def _kernels(setting: Setting, draw: Draw) -> Iterator[tuple[str, Iterable[Case]]]:
    tiny, shape = setting.tiny, setting.shape
    rows: Sequence[int] = (1, 3) if tiny else (1, 3, 67)
    norms = product(rows, (16, 24) if tiny else (4096, 768, 5120))
    yield "norms", chain.from_iterable(check_fused.norms(draw, *size) for size in norms)
    yield "rotary and store", check_fused.rotary(draw, tiny)
    gates = product(rows, (16, 24) if tiny else (14336, 4864, 100))
    yield "gated activation", (check_fused.gated(draw, *size) for size in gates)
    vocab = 300 if tiny else 128256
    yield "sampling", (check_fused.sampling(draw, rows, vocab) for rows in (1, 33))
    yield "attention, decode", check_attention.decodes(draw, tiny)
    yield "attention, prefill", check_attention.prefills(draw, tiny)
    yield "attention, integers", check_attention.integers(draw, tiny)
    yield "LoRA", check_lora.cases(draw, shape, tiny)
    yield "LoRA, replayed", check_lora.replayed(draw, shape, tiny)
    yield "LoRA, integers", check_lora.integers(draw, shape, tiny)


def _check(setting: Setting, name: str, cases: Iterable[Case], tolerance: float) -> None:
    """The worst of all cases goes into the short table."""
    worst, where, most = 0.0, "", tolerance
    for case in cases:
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
    setting.report.add(SECTION, f"{name}, worst relative error", worst, most=most, beside=where)
