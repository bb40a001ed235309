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


def attention() -> None:
    """Llama-3.1-8B's heads over a cache of two layers; few and many rows, short and long."""
    from lora_kernels import attention

    heads, head_dim = 32, 128
    keys, values = _cache()
    scratch = attention.decode_scratch(256, heads, head_dim, keys.device)
    q = torch.empty(2304, heads + 16, head_dim, dtype=torch.bfloat16)[:, :heads]
    out = torch.empty(2304, heads, head_dim, dtype=torch.bfloat16)
    numbers = torch.zeros(300, dtype=torch.int32)
    for rows in (1, 2, 3, 16, 37, 64, 256):
        for pages, window in ((64, None), (1024, None), (64, 512)):
            table = torch.zeros(rows, pages, dtype=torch.int32)
            over = (q[:rows], keys, values, table, numbers[:rows])
            attention.decode(*over, 0.1, window, None, out[:rows], scratch)
    # Beside some rows in decode, so that addresses are odd.
    for before, tokens, chunks in ((0, 2048, 1), (3, 2047, 1), (37, 300, 16), (1, 17, 2)):
        table = torch.zeros(chunks, 1024, dtype=torch.int32)
        over = (q[before : before + tokens], keys, values, table)
        starts, lengths = numbers[before : before + chunks + 1], numbers[before : before + chunks]
        attention.prefill(
            *over, starts, lengths, tokens, 0.1, None, None, out[before : before + tokens]
        )
    # Whatever the rows: for each window one decode, a join of few segments and one of many (512
    # keys are never many), prefill with small and with large tiles.
    found = [kernel.name for kernel in COMPILED]
    assert found.count("decode_kernel") == 2, found
    assert found.count("join_kernel") == 3, found
    assert found.count("prefill_kernel") == 2, found


def fused() -> None:
    from lora_kernels import fused

    heads, kv_heads, head_dim = 32, 8, 128
    keys, values = _cache()
    weight = torch.empty(4096, dtype=torch.bfloat16)
    tables = torch.empty(2, 4096, head_dim, dtype=torch.bfloat16)
    for tokens in (1, 64, 2048):
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
        fused.rms_norm(x, weight, 1e-5)
        fused.add_rms_norm(x, x.clone(), weight, 1e-5)
        fused.silu_mul(torch.empty(tokens, 2 * 14336, dtype=torch.bfloat16))
        qkv = torch.empty(tokens, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16)
        at = torch.zeros(tokens, dtype=torch.int32)
        for norm in (None, weight[:head_dim]):
            fused.rotary_store(qkv, at, *tables, keys, values, at, norm, norm, 1e-6)
    logits = torch.empty(64, 128256, dtype=torch.bfloat16)
    fused.choose(logits, torch.empty(64), torch.empty(64))


def _cache() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one of two layers in pages of 16 tokens, as the paged decoder has them."""
    memory = torch.empty(4, 2, 2, 8, 16, 128, dtype=torch.bfloat16)
    return memory[:, 1, 0], memory[:, 1, 1]


CASES = {"attention": attention, "fused": fused, "lora": lora}

if __name__ == "__main__":
    intercept()
    CASES[sys.argv[1]]()
    for each in COMPILED:
        print(each.name, each.shared_bytes, "bytes of shared memory")
        assert each.shared_bytes <= SHARED_BYTES_MAX
