"""Seconds to read an adapter into host memory: alone, and beside threads that want the GIL.

Run with `python -m tests.bench.read_adapter`. The adapter has rank 16 on all seven projections of
Llama-3.1-8B's shape: 84 MB in bf16, or 168 MB in fp32, which is converted. It is read by a loader's
thread from the page cache; `--cold` evicts it from there before each read.

beside a launching thread: one that runs small torch operations, as an engine that launches kernels.
beside a spinning one: one that runs Python bytecode without end.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE
from replica.adapters.image import read_image
from replica.model.shape import ModelShape, read_shape

_SHAPE = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
_BLOCKS = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reads", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=60.0, help="for the reads of one row")
    parser.add_argument("--cold", action="store_true", help="evict the file from the page cache")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_SHAPE))
        shape = read_shape(directory)
        for stored, bits in (("BF16", numpy.uint16), ("F32", numpy.uint32)):
            path = write(Path(directory) / stored, shape, args.rank, stored, bits)
            size = (path / TENSORS_FILE).stat().st_size
            for name, thread in (("alone", None), ("launching", launch), ("spinning", spin)):
                with beside(thread):
                    found = times(path, shape, args)
                print(
                    f"{stored:4} {size / 1e6:4.0f} MB, {name:9}: median "
                    f"{statistics.median(found):.3f} s, longest {max(found):.3f} s "
                    f"of {len(found)}",
                    flush=True,
                )


def write(
    path: Path, shape: ModelShape, rank: int, stored: str, bits: type[numpy.unsignedinteger]
) -> Path:
    """Small random values, in the order of names that safetensors writes."""
    path.mkdir()
    targets = list(shape.projections)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (path / CONFIG_FILE).write_text(json.dumps(config))
    sizes: dict[str, tuple[int, int]] = {}
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.projections.items():
            stem = f"base_model.model.model.layers.{layer}.{_BLOCKS.get(name, 'self_attn')}.{name}"
            sizes[f"{stem}.lora_A.weight"] = (rank, inputs)
            sizes[f"{stem}.lora_B.weight"] = (outputs, rank)
    header, end = {}, 0
    for name in sorted(sizes):
        begin, end = end, end + sizes[name][0] * sizes[name][1] * bits().itemsize
        header[name] = {"dtype": stored, "shape": sizes[name], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    values = torch.randn(end // bits().itemsize) * 0.02
    data = values.bfloat16().view(torch.uint16) if bits is numpy.uint16 else values
    with (path / TENSORS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data.numpy().tofile(file)
        os.fsync(file.fileno())  # else its pages could not be evicted
    return path


def times(path: Path, shape: ModelShape, args: argparse.Namespace) -> list[float]:
    found: list[float] = []
    with ThreadPoolExecutor(1) as loader:
        into = torch.empty(2**27, dtype=torch.bfloat16).fill_(0)  # in memory, like a locked pool
        while len(found) < args.reads and sum(found) < args.limit_s:
            if args.cold:
                evict(path / TENSORS_FILE)
            found.append(loader.submit(read_once, str(path), shape, into).result())
    return found


def read_once(path: str, shape: ModelShape, into: torch.Tensor) -> float:
    start_s = time.perf_counter()
    read_image(path, shape, torch.bfloat16, into=into)
    return time.perf_counter() - start_s


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def beside(thread: Callable[[threading.Event], None] | None) -> Iterator[None]:
    done = threading.Event()
    running = thread and threading.Thread(target=thread, args=(done,))
    if running:
        running.start()
    try:
        yield
    finally:
        done.set()
        if running:
            running.join()


def launch(done: threading.Event) -> None:
    row = torch.ones(64)
    while not done.is_set():
        for _ in range(100):
            row.add_(1.0)


def spin(done: threading.Event) -> None:
    while not done.is_set():
        for _ in range(100_000):
            pass


if __name__ == "__main__":
    main()
