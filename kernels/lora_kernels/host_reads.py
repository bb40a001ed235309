"""Copies small tables from host to device with a kernel that reads host memory.

A GPU's copy engine runs copies one after the other, even of different streams: a 51 KB copy was
seen to wait 12 ms behind a 200 MB one (NVIDIA/cudf issue 15620). With plain copies, a batch would
wait for its tables while an adapter is being copied in.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.launching import Launcher

_BLOCK = 1024


def fetch(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies `source` to `target` on the current stream. Both: contiguous int32, of equal length.

    source: page-locked if the target is on a GPU. It must not change before the stream reads it.
    """
    assert target.dtype == source.dtype == torch.int32 and target.shape == source.shape
    assert target.is_contiguous() and source.is_contiguous()
    if target.is_cpu:
        target.copy_(source)
        return
    assert source.is_pinned()
    count = source.numel()
    fetch_kernel[(-(-count // _BLOCK),)](target, source, count, BLOCK=_BLOCK)


# A single compiled variant for all arguments, so that no batch waits for the compiler.
@Launcher
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["target", "source"])
def fetch_kernel(target, source, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    tl.store(target + index, tl.load(source + index, mask=mask), mask=mask)
