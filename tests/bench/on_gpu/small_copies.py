"""How long a batch's own numbers take to the device, alone and while an adapter is copied in.

They are copied, as the adapter is, or fetched by a kernel; the adapter comes in one copy, or as an
engine copies it.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lora_kernels.host_reads import fetch
from replica.adapters.streams import CopyStream
from tests.bench.on_gpu.figures import median
from tests.bench.on_gpu.setting import Setting
from tests.bench.on_gpu.timing import host_s

SECTION = "time"
_NUMBERS = 2**14
# The large copy is to be well under way.
_HEAD_START_S = 0.004


@dataclass(slots=True)
class _Large:
    """In page-locked memory of the host, and where it goes."""

    device: torch.device
    source: torch.Tensor
    target: torch.Tensor

    def at_once(self) -> None:
        if self.device.type != "cuda":
            self.target.copy_(self.source)
            return
        with torch.cuda.stream(torch.cuda.Stream()):
            self.target.copy_(self.source, non_blocking=True)

    def in_pieces(self) -> None:
        if self.device.type != "cuda":
            self.target.copy_(self.source)
            return
        copies = CopyStream.on(self.device)
        copies.copy(self.target, self.source, [], locked=True).synchronize()


# Another thread is to write what is made here.
@torch.inference_mode(False)
def run(setting: Setting) -> None:
    device, on_gpu = setting.device, setting.device.type == "cuda"
    size = 2**16 if setting.tiny else 2**30
    source = torch.empty(size, dtype=torch.int8, pin_memory=on_gpu)
    large = _Large(device, source.fill_(1), torch.empty(size, dtype=torch.int8, device=device))
    here = torch.arange(_NUMBERS, dtype=torch.int32)
    here = here.pin_memory() if on_gpu else here
    there = torch.zeros(_NUMBERS, dtype=torch.int32, device=device)
    besides: Mapping[str, Callable[[], None] | None] = {
        "alone": None,
        "beside 1 GiB at once": large.at_once,
        "beside 1 GiB in pieces": large.in_pieces,
    }
    works: Mapping[str, Callable[[], object]] = {
        "copied": lambda: there.copy_(here, non_blocking=True),
        "fetched": lambda: fetch(there, here),
    }
    for how, work in works.items():
        for where, other in besides.items():
            found = [_took_s(device, work, other) for _ in range(8)][1:]
            setting.report.add(
                SECTION, f"64 KiB {how}, {where}", median(found) * 1e6, " µs", most_s=max(found)
            )
    assert torch.equal(there.cpu(), here.cpu())
    took = median([host_s(large.in_pieces) for _ in range(4)][1:])
    setting.report.add(SECTION, "1 GiB copied in pieces", size / took / 1e9, " GB/s")


def _took_s(
    device: torch.device, work: Callable[[], object], other: Callable[[], None] | None
) -> float:
    """Until the device has the numbers, on the host's clock."""
    thread = None if other is None else threading.Thread(target=other)
    if thread is not None:
        thread.start()
        time.sleep(_HEAD_START_S)
    start_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    took_s = time.perf_counter() - start_s
    if thread is not None:
        thread.join()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return took_s
