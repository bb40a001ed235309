"""Names that nobody registered, looked up in a directory of thousands of adapters.

    python -m tests.bench.sources [--adapters N]

A fleet of two replicas with `--adapter-source`: how long the first answer of an adapter takes that
nobody registered, and the refusal of a name that nobody has, the first time and the second.
Goal: the second refusal within 10 ms.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.fleet import fleet
from tests.models import make_adapter, make_model

TRIES = 50
GOAL_S = 0.01


def fill(root: Path, model: str, count: int) -> None:
    """Directories of one adapter's files."""
    first = Path(make_adapter(root / "n0", model))
    for n in range(1, count):
        (root / f"n{n}").mkdir()
        for file in first.iterdir():
            os.link(file, root / f"n{n}" / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=10_000)
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = make_model(root / "m")
        (root / "adapters").mkdir()
        fill(root / "adapters", model, args.adapters)
        (root / "run").mkdir()
        arguments = ["--model", model, "--device", "cpu", "--replicas", "2"]
        arguments += ["--adapter-source", str(root / "adapters")]
        with (
            fleet(arguments, root / "run") as running,
            httpx.Client(base_url=running.url, timeout=60) as client,
        ):

            def ask(name: str, expected: int) -> float:
                body = {"model": name, "prompt": "x", "max_tokens": 1}
                began_s = time.monotonic()
                answer = client.post("/v1/completions", json=body)
                took_s = time.monotonic() - began_s
                assert answer.status_code == expected, (name, answer.text)
                return took_s

            ask("m", 200)
            known = [f"n{n}" for n in rng.sample(range(args.adapters), TRIES)]
            unknown = [f"nobody{n}" for n in range(TRIES)]
            rows = {"the base model": [ask("m", 200) for _ in range(TRIES)]}
            for time_ in ("first", "second"):
                rows[f"an adapter of the directory, the {time_} time"] = [
                    ask(n, 200) for n in known
                ]
            for time_ in ("first", "second"):
                rows[f"an unknown name, the {time_} time: 404"] = [ask(n, 404) for n in unknown]
    print(f"| {args.adapters:,} directories, {TRIES} names | median, ms | longest, ms |")
    print("|---|---:|---:|")
    for what, took in rows.items():
        print(f"| {what} | {statistics.median(took) * 1e3:.1f} | {max(took) * 1e3:.1f} |")
    refused_s = statistics.median(took)
    print(f"\n{'met' if refused_s <= GOAL_S else 'MISSED'}: {refused_s * 1e3:.1f} ms, goal 10 ms")


if __name__ == "__main__":
    main()
