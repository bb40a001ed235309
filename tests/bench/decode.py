"""Decode tokens/s as ratios: the engine to its matmuls alone, 16 adapters to the base model, and
the same model through transformers' modules to our decoder.

Run with `python -m tests.bench.decode`. The compared variants take turns step by step in one
process, so that a busy machine slows all of them alike. A ratio is the median over such turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.model.memory import DTYPE_BYTES
from replica.model.module_walk import walk
from replica.model.shape import read_shape
from replica.model.weights import Linear, load_weights
from replica.scheduling.request import NewRequest, Sampling
from tests.models import make_adapter, make_model

PROMPT_TOKENS = 128
RANKS = (8, 16, 32, 64)
MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="requests decoded together")
    parser.add_argument("--steps", type=int, default=64, help="decode steps measured a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPE_BYTES),
        default="auto",
        help="default: the engine's choice on this machine for a bfloat16 checkpoint",
    )
    parser.add_argument("--profile", action="store_true", help="print a profile of base steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(args, Path(directory))


def measure(args: argparse.Namespace, directory: Path) -> None:
    model_dir = make_model(directory / "model", dtype=torch.bfloat16, **MODEL)
    config = EngineConfig(
        model=model_dir,
        device="cpu",
        adapter_memory=512 * 2**20,
        kv_memory=512 * 2**20,
        step_tokens_max=args.rows * PROMPT_TOKENS,
        threads=args.threads,
        dtype=args.dtype,
    )
    base, mixed = Engine(config), Engine(config)
    with mock.patch("replica.engine.engine.read_shape_here", walk):
        modules = Engine(config)
    digests = [
        register(mixed, directory / f"adapter-{n}", model_dir, RANKS[n % len(RANKS)], n)
        for n in range(args.adapters)
    ]
    matmuls = _matmuls(model_dir, args.rows, base.runner.dtype)
    times: dict[str, list[float]] = {"matmuls": [], "base": [], "mixed": [], "modules": []}
    variants = (
        ("matmuls", matmuls),
        ("base", base.step),
        ("mixed", mixed.step),
        ("modules", modules.step),
    )
    for round_ in range(args.rounds + 1):
        fill(base, [None] * args.rows)
        fill(modules, [None] * args.rows)
        fill(mixed, [digests[i % len(digests)] for i in range(args.rows)])
        for _ in range(args.steps):
            for name, step in variants:
                elapsed_s = _timed(step)
                if round_:  # The first round warms up.
                    times[name].append(elapsed_s)
        for engine in (base, mixed, modules):
            _empty(engine, args)
    _print(args, base.config.dtype, times)
    if args.profile:
        _profile(base, args)


def _print(args: argparse.Namespace, dtype: str, times: dict[str, list[float]]) -> None:
    def ratio(over: str, under: str) -> float:
        pairs = zip(times[under], times[over], strict=True)
        return statistics.median(u / o for u, o in pairs)

    print(
        f"{args.rows} rows, context {PROMPT_TOKENS}–{PROMPT_TOKENS + args.steps}, {dtype}, "
        f"{torch.get_num_threads()} threads, {len(times['base'])} steps each"
    )
    for name, text in (
        ("matmuls", "matmuls alone"),
        ("base", "engine, base only"),
        ("mixed", f"engine, {args.adapters} adapters"),
        ("modules", "base, transformers"),
    ):
        middle = statistics.median(times[name])
        print(f"{text:22} {middle * 1e3:7.1f} ms a step {args.rows / middle:8.0f} tokens/s")
    print(f"base only / matmuls alone: {ratio('base', 'matmuls'):.2f} (target 0.50)")
    print(
        f"{args.adapters} adapters of ranks {', '.join(map(str, RANKS))} / base only: "
        f"{ratio('mixed', 'base'):.2f} (target 0.75)"
    )
    print(f"through transformers' modules / our decoder: {ratio('modules', 'base'):.2f}")


def _matmuls(model_dir: str, rows: int, dtype: torch.dtype) -> Callable[[], object]:
    shape = read_shape(model_dir)
    matrices: list[torch.Tensor] = []

    def keep(weight: torch.Tensor) -> Linear:
        matrices.append(weight)
        return partial(F.linear, weight=weight)

    load_weights(model_dir, shape, dtype, torch.device("cpu"), keep)
    inputs = {m.shape[1]: torch.randn(rows, m.shape[1], dtype=dtype) for m in matrices}

    @torch.inference_mode()
    def run() -> None:
        for matrix in matrices:
            F.linear(inputs[matrix.shape[1]], matrix)

    return run


def register(engine: Engine, path: Path, model_dir: str, rank: int, seed: int) -> str:
    """Makes the adapter unless it is there. Returns its digest."""
    if not path.exists():
        make_adapter(path, model_dir, rank=rank, seed=seed, strength=0.02)
    info = inspect(str(path), engine.shape, engine.config.rank_max)
    version = Version(path.name, info.digest, str(path), info.rank, info.parameters)
    engine.register(version, str(path))
    return info.digest


def fill(engine: Engine, digests: Sequence[str | None]) -> None:
    """Adds requests and steps until each has its first token, so that later steps only decode."""
    generator = torch.Generator().manual_seed(0)
    for i, digest in enumerate(digests):
        prompt = torch.randint(6, engine.shape.vocab, (PROMPT_TOKENS,), generator=generator)
        sampling = Sampling(max_tokens=1024, temperature=0.0, ignore_eos=True)
        engine.add(NewRequest(f"{i}", tuple(prompt.tolist()), sampling, digest))
    started: set[str] = set()
    while len(started) < len(digests):
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            started.add(delta.request_id)


def _empty(engine: Engine, args: argparse.Namespace) -> None:
    for i in range(args.rows):
        engine.cancel(f"{i}")


def _timed(step: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


def _profile(engine: Engine, args: argparse.Namespace) -> None:
    fill(engine, [None] * args.rows)
    with torch.profiler.profile() as profile:
        for _ in range(args.steps):
            engine.step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
