"""Tokens/s of one model by our own decoder and through transformers' modules.

Run with `python -m tests.bench.fallback [--architecture gemma2] > tests/bench/results/fallback.md`.
A 12-layer model of width 768, random weights. Decode: rows of the base model and of adapters of
ranks 8 to 64 in turn. Prefill: prompts of the same mix, in one step. Both engines live in one
process and take turns, step by step, so that a busy machine slows both alike. Times are medians,
and ratios medians of such turns; the first round warms up.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from cluster.config import EngineConfig
from replica.engine.engine import Engine
from replica.model.module_walk import walk
from replica.model.shape import ModelShape
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.decode import MODEL, RANKS, fill, register
from tests.models import make_model

PREFILL_ROWS, PREFILL_TOKENS = 4, 256
NAMES = ("our own decoder", "through transformers")
Turns = list[tuple[float, float]]
"""Seconds of each engine's turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    families = ("llama", "granite", "gemma2", "gemma3_text")
    parser.add_argument("--architecture", choices=families, default="llama")
    parser.add_argument("--rows", type=int, default=32, help="requests decoded together")
    parser.add_argument("--steps", type=int, default=32, help="decode steps a round")
    parser.add_argument("--prefills", type=int, default=6, help="steps of prompts a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        native, modules, digests = _engines(args, Path(directory))
        mix = [None, *digests]
        decodes: Turns = []
        prefills: Turns = []
        for round_ in range(args.rounds + 1):
            decoded = _decode((native, modules), args, mix)
            prefilled = _prefill((native, modules), args, mix, seed=round_)
            if round_:
                decodes += decoded
                prefills += prefilled
    print(f"# {args.architecture} by our own decoder and through transformers\n")
    print(
        f"`python -m tests.bench.fallback`: {native.config.dtype}, {torch.get_num_threads()} "
        f"threads; {args.rows} rows decode, {PREFILL_ROWS} prompts of {PREFILL_TOKENS} tokens; the "
        f"base model and {args.adapters} adapters of ranks {', '.join(map(str, RANKS))}.\n"
    )
    print(f"| | {NAMES[0]}, tokens/s | {NAMES[1]}, tokens/s | ratio | turns |")
    print("| --- | ---: | ---: | ---: | ---: |")
    _print("decode", args.rows, decodes)
    _print("prefill", PREFILL_ROWS * PREFILL_TOKENS, prefills)


def _engines(args: argparse.Namespace, directory: Path) -> tuple[Engine, Engine, list[str]]:
    """Native and through transformers, with the digests of adapters that both know."""
    settings = dict(MODEL)
    if args.architecture.startswith("gemma"):
        settings["query_pre_attn_scalar"] = settings["head_dim"]
    model_dir = make_model(directory / "model", args.architecture, dtype=torch.bfloat16, **settings)
    config = EngineConfig(
        model=model_dir,
        device="cpu",
        adapter_memory=512 * 2**20,
        kv_memory=512 * 2**20,
        step_tokens_max=max(args.rows * 128, PREFILL_ROWS * PREFILL_TOKENS),
        dtype=args.dtype,
    )
    native = Engine(config)
    assert isinstance(native.shape, ModelShape)
    with mock.patch("replica.engine.engine.read_shape_here", walk):
        modules = Engine(config)
    digests = []
    for n in range(args.adapters):
        path, rank = directory / f"adapter-{n}", RANKS[n % len(RANKS)]
        digests += {register(each, path, model_dir, rank, n) for each in (native, modules)}
    return native, modules, digests


def _decode(
    engines: tuple[Engine, Engine], args: argparse.Namespace, mix: Sequence[str | None]
) -> Turns:
    for engine in engines:
        fill(engine, [mix[i % len(mix)] for i in range(args.rows)])
    turns = [(_timed(engines[0].step), _timed(engines[1].step)) for _ in range(args.steps)]
    for engine in engines:
        for i in range(args.rows):
            engine.cancel(f"{i}")
        while engine.has_work:
            engine.step()
    return turns


def _prefill(
    engines: tuple[Engine, Engine], args: argparse.Namespace, mix: Sequence[str | None], seed: int
) -> Turns:
    generator = torch.Generator().manual_seed(seed)
    turns = []
    for n in range(args.prefills):
        size = (PREFILL_ROWS, PREFILL_TOKENS)
        prompts = torch.randint(6, engines[0].shape.vocab, size, generator=generator).tolist()

        def turn(engine: Engine, prompts: list[list[int]] = prompts, n: int = n) -> None:
            for i, prompt in enumerate(prompts):
                digest = mix[(n * PREFILL_ROWS + i) % len(mix)]
                sampling = Sampling(max_tokens=1, temperature=0.0)
                engine.add(NewRequest(f"{seed}-{n}-{i}", tuple(prompt), sampling, digest))
            while engine.has_work:
                engine.step()

        turns.append((_timed(lambda: turn(engines[0])), _timed(lambda: turn(engines[1]))))
    return turns


def _timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def _print(name: str, tokens: int, turns: Turns) -> None:
    own, others = (tokens / statistics.median(times) for times in zip(*turns, strict=True))
    ratio = statistics.median(other / mine for mine, other in turns)
    print(f"| {name} | {own:.0f} | {others:.0f} | {ratio:.2f} | {len(turns)} |")


if __name__ == "__main__":
    main()
