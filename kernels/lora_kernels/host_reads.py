"""Few numbers from the host's memory to the device's by a kernel that reads them there.

The engines that copy do one thing after the other, whatever the stream: 51 KB were seen to wait for
12 ms behind 200 MB (NVIDIA/cudf issue 15620). So a batch would wait for its own numbers while an
adapter is copied in.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.launching import Launcher

_BLOCK = 1024


def fetch(target: torch.Tensor, source: torch.Tensor) -> None:
    """Equally long, flat, int32. source: page-locked where the target is a GPU's; it is read when
    the current stream comes to it, so that it must stay as it is until then.
    """
    assert target.dtype == source.dtype == torch.int32 and target.shape == source.shape
    assert target.is_contiguous() and source.is_contiguous()
    if target.is_cpu:
        target.copy_(source)
        return
    assert source.is_pinned()
    count = source.numel()
    fetch_kernel[(-(-count // _BLOCK),)](target, source, count, BLOCK=_BLOCK)


# One variant for all, so that no batch waits for a compiler.
@Launcher
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["target", "source"])
def fetch_kernel(target, source, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)
