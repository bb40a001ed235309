"""Compiles what a program would launch for a Hopper GPU, where there is none.

Run as a program of its own, without TRITON_INTERPRET: `python -m tests.kernels.hopper CASE`.
Tensors lie on the CPU; a launch compiles its kernel for its real arguments and goes no further.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cluster.config import EngineConfig
from replica.adapters.arena import Arena
from replica.adapters.image import Layout
from replica.model.decoder import rotary_tables
from replica.model.launch import Row
from replica.model.memory import divide
from replica.model.native import NativeModel
from replica.model.page_memory import PageMemory
from replica.model.shape import PROJECTIONS, ModelShape, read_shape
from replica.model.weights import Linear, load_weights
from replica.scheduling.request import Sampling
from tests.kernels.machine_code import overwritten

CPU = torch.device("cpu")
# Of one block, on a Hopper GPU.
SHARED_BYTES_MAX = 227 * 1024


@dataclass(frozen=True)
class Compiled:
    """layouts: Triton's own code of the kernel, after it has chosen layouts and pipelines."""

    name: str
    shared_bytes: int
    layouts: str
    ptx: str
    machine_code: bytes


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
                    kernel.asm["cubin"],
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
    # The last is not captured, so that its ranks choose the tiling.
    for slots, rows in (([1] * 16, 16), ([1] * 64, 64), ([1] * 2048, 2048), ([1, 0] * 1024, None)):
        operation.begin(slots, rows)
        for layer in range(layers):
            for number in (0, 2, 3):
                group = groups[number]
                x = torch.empty(len(slots), group[0][1], dtype=torch.bfloat16)
                y = torch.empty(len(slots), sum(entry[2] for entry in group), dtype=torch.bfloat16)
                operation.start(x, layer, number)
                if number == 2:
                    operation.add_gated(x, y, layer, number)
                    operation.add_gated(x, y, layer, number, True)
                else:
                    operation.add(x, y, layer, number)
    # Each once for each tiling, group and activation: the layer makes no difference.
    assert len(COMPILED) == 4 * 7, [kernel.name for kernel in COMPILED]
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
    for kernel in COMPILED:
        if kernel.name == "prefill_kernel":
            products, late = overwritten(kernel.machine_code)
            assert products and not late, late


def fused() -> None:
    from lora_kernels import fused
    from lora_kernels.host_reads import fetch_kernel

    heads, kv_heads, head_dim = 32, 8, 128
    keys, values = _cache()
    weight = torch.empty(4096, dtype=torch.bfloat16)
    tables = torch.empty(2, 4096, head_dim, dtype=torch.bfloat16)
    for tokens in (1, 64, 2048):
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
        fused.rms_norm(x, weight, 1e-5)
        fused.add_rms_norm(x, x.clone(), weight, 1e-5)
        fused.add_rms_norm(x, x.clone(), weight.float(), 1e-5, 0.22)
        for gated in (fused.silu_mul, fused.gelu_mul):
            gated(torch.empty(tokens, 2 * 14336, dtype=torch.bfloat16))
        qkv = torch.empty(tokens, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16)
        at = torch.zeros(tokens, dtype=torch.int32)
        for norm in (None, weight[:head_dim]):
            fused.rotary_store(qkv, at, *tables, keys, values, at, norm, norm, 1e-6)
    for count in (1, 7, 4096):
        fetch_kernel[(1,)](at[:count], at[-count:], count, BLOCK=1024)
    assert [kernel.name for kernel in COMPILED].count("fetch_kernel") == 1
    logits = torch.empty(64, 128256, dtype=torch.bfloat16)
    fused.choose(logits, torch.empty(64), torch.empty(64))


def executor() -> None:
    """A whole model: once a runner has begun, no batch has anything compiled."""
    with tempfile.TemporaryDirectory() as directory:
        shape = _model(Path(directory))
        config = EngineConfig(
            directory,
            dtype="bfloat16",
            load_format="dummy",
            kernels="torch",
            adapter_memory=2**24,
            kv_memory=2**22,
        )
        weights = load_weights(
            directory, shape, torch.bfloat16, CPU, linear=_no_matmul, dummy_seed=0
        )
    from lora_kernels import fused
    from lora_kernels.matmuls import Matmuls
    from replica.model.graphs import keep
    from replica.model.paged_attention import paged_cache
    from replica.model.paged_executor import PagedExecutor

    # Nothing is computed here, and what comes out is to be taken for tokens.
    launch = fused.choose
    fused.choose = lambda *inputs: launch(*inputs).zero_()
    Matmuls.add = lambda *inputs: None  # type: ignore[method-assign]
    arena = Arena(shape, 2**24, 8, torch.bfloat16)
    offset = 0
    for slot, rank in enumerate((8, 16, 5, 64), 1):
        layout, elements = _layout(shape, rank)
        arena.place(slot, offset, layout)
        offset += -(-2 * elements // arena.alignment) * arena.alignment
    pages = PageMemory(divide(config, shape, 2), torch.bfloat16, CPU)
    tables = rotary_tables(shape, shape.context, torch.bfloat16, CPU)
    cache = paged_cache(pages.flat, shape, config.page_tokens)
    model = NativeModel(shape, weights, tables)
    made = PagedExecutor(model, cache, arena.triton_lora(64), 20, 600)
    made.warm()
    made.capture(keep)
    before, rng = len(COMPILED), random.Random(0)
    assert before
    for _ in range(150):
        made.launch(_batch(rng, len(cache) - 1))
    late = [kernel.name for kernel in COMPILED[before:]]
    assert not late, f"compiled while requests wait: {late}"


def _no_matmul(weight: torch.Tensor) -> Linear:
    """The right type and size: many a CPU would take most of the test's time for bfloat16."""
    return lambda x: x.new_zeros(*x.shape[:-1], len(weight))


def _batch(rng: random.Random, pages: int) -> list[Row]:
    """Decodes, chunks, or both; now and then all of the base model or of one adapter."""
    chunks = rng.choice((0, 0, 1, 1, 2, 3))
    decodes = rng.randint(0 if chunks else 1, 17)
    slots = rng.choice(([0], [2], [3], range(5)))
    plain = [None, Sampling(temperature=0.0), Sampling(temperature=1.0)]
    wanted = rng.choice((plain, [*plain, Sampling(temperature=1.0, top_p=0.9, logprobs=2)]))
    counts = [1] * decodes + [rng.choice((2, 3, 16, 100, 190)) for _ in range(chunks)]
    rows = []
    for count in counts:
        start = rng.choice((0, 1, 17, 300, 800))
        held = [rng.randrange(pages) for _ in range(-(-(start + count) // 16))]
        rows.append(Row([3] * count, start, held, rng.choice(slots), rng.choice(wanted), 0, 0))
    return rows


def _model(directory: Path) -> ModelShape:
    config = {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 5000,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return read_shape(str(directory))


def _layout(shape: ModelShape, rank: int) -> tuple[Layout, int]:
    size = (shape.layers, len(PROJECTIONS))
    widths = [rank * width for p in PROJECTIONS for width in shape.projections[p]]
    starts = np.cumsum([0, *widths * shape.layers])[:-1].reshape(*size, 2)
    ranks, scales = np.full(size, rank, np.int32), np.ones(size, np.float32)
    return Layout(starts[..., 0], starts[..., 1], ranks, scales), sum(widths) * shape.layers


def _cache() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one of two layers in pages of 16 tokens, as the paged decoder has them."""
    memory = torch.empty(4, 2, 2, 8, 16, 128, dtype=torch.bfloat16)
    return memory[:, 1, 0], memory[:, 1, 1]


CASES = {"attention": attention, "executor": executor, "fused": fused, "lora": lora}

if __name__ == "__main__":
    intercept()
    CASES[sys.argv[1]]()
    for each in COMPILED:
        print(each.name, each.shared_bytes, "bytes of shared memory")
        assert each.shared_bytes <= SHARED_BYTES_MAX
