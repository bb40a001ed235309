"""Compiles what a program would launch for a Hopper GPU, where there is none.

Run as a program of its own, without TRITON_INTERPRET: `python -m tests.kernels.hopper CASE`.
Tensors lie on the CPU; a launch compiles its kernel for its real arguments and goes no further.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Of one block, on a Hopper GPU.
SHARED_BYTES_MAX = 227 * 1024


@dataclass(frozen=True)
class Compiled:
    """layouts: Triton's own code of the kernel, after it has chosen layouts and pipelines."""

    name: str
    shared_bytes: int
    layouts: str
    ptx: str


class _Driver:
    """As much of a device as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


COMPILED: list[Compiled] = []


def intercept() -> None:
    """From now on a launch compiles, and is listed."""
    triton.runtime.driver.set_active(_Driver())
    seen: set[int] = set()

    def compiling(self: Any, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            if id(kernel) in seen:
                return
            seen.add(id(kernel))
            COMPILED.append(
                Compiled(
                    self.fn.__name__,
                    kernel.metadata.shared,
                    kernel.asm["ttgir"],
                    kernel.asm["ptx"],
                )
            )

        return launch

    JITFunction.__getitem__ = compiling


def lora() -> None:
    """Llama-3.1-8B's shapes in bf16; ranks and batches are data to the kernels."""
    from lora_kernels.lora import TritonLora
    from lora_kernels.reference import Directory

    sizes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]
    sizes += [(4096, 14336), (4096, 14336), (14336, 4096)]
    groups = [[(i, *sizes[i]) for i in group] for group in ((0, 1, 2), (3,), (4, 5), (6,))]
    layers = 2
    directory = Directory(2, layers, len(sizes))
    ranks = np.full((layers, len(sizes)), 16, np.int32)
    zeros = np.zeros(ranks.shape, np.int64)
    directory.write(1, 0, zeros, zeros, ranks, np.ones(ranks.shape, np.float32))
    operation = TritonLora(directory, torch.empty(16, dtype=torch.bfloat16), groups, rank_max=256)
    operation.reserve(2048)
    for rows in (16, 64, 2048):
        operation.begin([1] * rows, rows)
        for layer in range(layers):
            for number in (0, 3):
                group = groups[number]
                x = torch.empty(rows, group[0][1], dtype=torch.bfloat16)
                y = torch.empty(rows, sum(entry[2] for entry in group), dtype=torch.bfloat16)
                operation.start(x, layer, number)
                operation.add(x, y, layer, number)
    # Each once for each tiling and group: the layer makes no difference.
    assert len(COMPILED) == 3 * 4, [kernel.name for kernel in COMPILED]
    for kernel in COMPILED:
        # A, B and x are read by 16 bytes at once, straight into shared memory.
        assert "cp.async.cg.shared.global" in kernel.ptx, kernel.name
        for line in kernel.layouts.splitlines():
            if "warp_group_dot " in line:
                left = line.partition(" : ")[2].partition(" * ")[0]
                assert "memdesc" in left, f"{kernel.name}: left operand in registers: {line}"


CASES = {"lora": lora}

if __name__ == "__main__":
    intercept()
    CASES[sys.argv[1]]()
    for each in COMPILED:
        print(each.name, each.shared_bytes, "bytes of shared memory")
        assert each.shared_bytes <= SHARED_BYTES_MAX
