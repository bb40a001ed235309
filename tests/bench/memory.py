"""The cost of automatic memory sizing: `lorafleet replica` without memory flags and with 1 GiB.

    python -m tests.bench.memory [--rounds N] [--threads N] [--json]

16 adapters of ranks 8 to 64 on a model with 12 layers of 768. 32 requests arrive at once over HTTP,
two for each adapter. Each round starts a new replica of each kind, one after the other, in
alternating order, so that a busy machine slows both alike. The first requests after the start
count too, with the loads that they cause.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.bench.toys import toy_adapter, toy_model
from tests.fleet import LORAFLEET, environment, eventually
from tests.models import write_tokenizer

ADAPTERS = 16
RANKS = (8, 16, 32, 64)
GOAL = 0.9
WAYS = {"no flags": (), "1 GiB": ("--adapter-memory", "1GiB")}


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one replica in one round. itl_max_s: the longest ITL of any request."""

    tokens_per_s: float
    itl_max_s: float
    ttft_max_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found, logged = measure(args, Path(directory))
    result = figures(found)
    if args.json:
        print(json.dumps({"ways": result, "ratio": ratio(found), "said": logged}, indent=2))
    else:
        _print(args, found, logged)


def measure(
    args: argparse.Namespace, directory: Path
) -> tuple[dict[str, list[Run]], dict[str, list[str]]]:
    """The runs of each way, and the lines on memory and dtype that its replica printed."""
    model = directory / "model"
    shape = toy_model(model, hidden=768, layers=12, context=2048)
    write_tokenizer(model)
    common = ["--device", "cpu"]
    if args.threads is not None:
        common += ["--threads", str(args.threads)]
    for n in range(ADAPTERS):
        path = toy_adapter(directory / f"a{n}", shape, RANKS[n % len(RANKS)], n)
        common += ["--adapter", f"a{n}={path}"]
    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    logged: dict[str, list[str]] = {}
    for round_ in range(args.rounds):
        for way in WAYS if round_ % 2 == 0 else reversed(WAYS):
            log = directory / "log"
            with _replica(model, [*common, *WAYS[way]], log) as url:
                found[way].append(asyncio.run(_ask_all(url, args, round_)))
            logged[way] = [line for line in log.read_text().splitlines() if "ready: " not in line]
            run = found[way][-1]
            print(f"{way}: {run.tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
    return found, logged


def figures(found: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    return {
        way: {
            "tokens_per_s": statistics.median(run.tokens_per_s for run in runs),
            "itl_max_s": max(run.itl_max_s for run in runs),
            "ttft_max_s": statistics.median(run.ttft_max_s for run in runs),
        }
        for way, runs in found.items()
    }


def ratio(found: dict[str, list[Run]]) -> float:
    """The median over rounds. Both ways of a round ran under about the same machine load."""
    automatic, fixed = (found[way] for way in WAYS)
    pairs = zip(automatic, fixed, strict=True)
    return statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in pairs)


def _print(
    args: argparse.Namespace, found: dict[str, list[Run]], logged: dict[str, list[str]]
) -> None:
    print(
        f"{args.requests} requests at once, {args.prompt} tokens in, {args.output} out, "
        f"{ADAPTERS} adapters of ranks {', '.join(map(str, RANKS))}; {args.rounds} rounds"
    )
    for way, lines in logged.items():
        for line in lines:
            print(f"{way}: {line}")
    for way, of in figures(found).items():
        print(
            f"{way:9} {of['tokens_per_s']:6.0f} tokens/s, longest ITL {of['itl_max_s']:.2f} s, "
            f"last first token after {of['ttft_max_s']:.2f} s"
        )
    print(f"no flags / 1 GiB: {ratio(found):.2f} (goal {GOAL})")


@contextmanager
def _replica(model: Path, arguments: Sequence[str], log: Path) -> Iterator[str]:
    command = [LORAFLEET, "replica", "--model", str(model), "--port", "0", *arguments]
    root = str(Path(__file__).parents[2])
    paths = [root, f"{root}/kernels", os.environ.get("PYTHONPATH", "")]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment() | {"PYTHONPATH": ":".join(paths)}
        )

    def ready() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r"^ready: (http\S+)/v1$", log.read_text(), re.M)

    try:
        yield eventually(ready, "the replica is ready", 120)[1]
    finally:
        process.terminate()
        process.wait(30)


async def _ask_all(url: str, args: argparse.Namespace, seed: int) -> Run:
    generator = random.Random(seed)
    prompts = [generator.choices(range(5, 300), k=args.prompt) for _ in range(args.requests)]
    limits = httpx.Limits(max_connections=args.requests)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start_s = time.monotonic()
        times = await asyncio.gather(
            *(
                _ask(client, f"a{n % ADAPTERS}", prompt, args.output)
                for n, prompt in enumerate(prompts)
            )
        )
    assert all(len(own) == args.output for own in times), [len(own) for own in times]
    took_s = max(own[-1] for own in times) - start_s
    gaps = [after - before for own in times for before, after in itertools.pairwise(own)]
    first_s = max(own[0] for own in times) - start_s
    return Run(args.requests * args.output / took_s, max(gaps, default=0.0), first_s)


async def _ask(
    client: httpx.AsyncClient, name: str, prompt: Sequence[int], output: int
) -> list[float]:
    """The arrival time of each token."""
    body = {"model": name, "prompt": prompt, "max_tokens": output, "temperature": 0.0}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    arrivals: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            for choice in data["choices"]:
                arrivals += [time.monotonic()] * len(choice.get("token_ids") or [])
    return arrivals


if __name__ == "__main__":
    main()
