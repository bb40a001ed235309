"""Churn on a real engine: no token may come from another adapter's weights, or from old ones.

Run with `python -m tests.bench.churn`. Requests name random adapters, in alternating spells: all
adapters, most of them cold since the arena holds a tenth of them; then a few hot ones, which park
each other's rows. A quarter of the requests are urgent. Meanwhile requests are cancelled, and names
re-pointed to other weights and back.
The bench first computes every version's answers, one request at a time, and compares every token
of the churn with them.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.toys import toy_adapter, toy_model

RANKS = (4, 8, 16, 32)
PROMPTS = [tuple(range(3 + 7 * i, 23 + 12 * i)) for i in range(3)]
TOKENS = 96
# Requests in a spell, and adapters in a spell of hot ones.
SPELL, HOT = 100, 20

Answers = dict[tuple[str | None, int], list[int]]


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--places", type=int, default=6, help="largest images the arena holds")
    parser.add_argument("--plan-depth", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kv-memory", type=int, default=2**24, help="bytes; 2**20 is too little")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        churn(args, Path(directory))


def churn(args: argparse.Namespace, directory: Path) -> None:
    shape = toy_model(directory / "model", hidden=64, layers=2, context=256)
    versions = []
    for n in range(2 * args.adapters):
        rank = RANKS[n % len(RANKS)]
        path = toy_adapter(directory / str(n), shape, rank, n)
        info = inspect(path, shape, max(RANKS))
        versions.append(Version(f"v{n}", info.digest, path, info.rank, info.parameters))
    expected = answers(str(directory / "model"), versions)
    distinct = len({tuple(tokens) for (_, i), tokens in expected.items() if i == 0})
    print(f"{distinct} of {len(versions) + 1} versions answer the first prompt in their own way")
    image = max(v.parameters for v in versions) * 4
    engine = Engine(
        EngineConfig(
            str(directory / "model"),
            threads=1,
            seed=args.seed,
            adapter_memory=args.places * image,
            host_memory=3 * image,
            kv_memory=args.kv_memory,
            batch_rows_max=16,
            plan_depth=args.plan_depth,
            quantum_s=0.002,
        )
    )
    start_s = time.monotonic()
    counts = drive(engine, versions, args, expected)
    report = engine.report()
    print(
        f"{counts['finished']} finished, {counts['cancelled']} cancelled, "
        f"{counts['repointed']} names re-pointed, {time.monotonic() - start_s:.0f} s"
    )
    print(
        f"{report.loads} loads, {report.evictions} evictions, {report.parks} rows parked, "
        f"{report.preemptions} computed again"
    )
    print(f"{counts['tokens']} tokens compared, wrong-adapter tokens: {counts['wrong']}")
    engine.close()
    if counts["wrong"]:
        raise SystemExit(1)


def answers(model: str, versions: Sequence[Version]) -> Answers:
    """Each version's answer to each prompt, with one request at a time."""
    engine = Engine(EngineConfig(model, threads=1, adapter_memory=256 * 2**20))
    found: Answers = {}
    for version in versions:
        engine.register(version, version.uri)
    for digest in [None, *(v.digest for v in versions)]:
        for i, prompt in enumerate(PROMPTS):
            engine.add(NewRequest("r", prompt, greedy(TOKENS), digest))
            found[digest, i] = []
            while engine.has_work:
                for delta in engine.step():
                    found[digest, i] += delta.tokens
    engine.close()
    return found


def drive(
    engine: Engine, versions: Sequence[Version], args: argparse.Namespace, expected: Answers
) -> Counter[str]:
    rng = random.Random(args.seed)
    # Name → its current version, which is registered, and another, which is not.
    names = {f"n{i}": (versions[2 * i], versions[2 * i + 1]) for i in range(args.adapters)}
    for current, _ in names.values():
        engine.register(current, current.uri)
    asked: dict[str, tuple[str | None, int]] = {}
    got: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    sent = 0
    while sent < args.requests or engine.has_work:
        while sent < args.requests and len(asked) < 40:
            spell = list(names)[: HOT if sent // SPELL % 2 else None]
            name = rng.choice([None, *spell])
            digest = None if name is None else names[name][0].digest
            asked[f"r{sent}"] = (digest, rng.randrange(len(PROMPTS)))
            got[f"r{sent}"] = []
            prompt = PROMPTS[asked[f"r{sent}"][1]]
            sampling, priority = greedy(rng.randint(1, TOKENS)), rng.choice((-1, 0, 0, 0))
            engine.add(NewRequest(f"r{sent}", prompt, sampling, digest, priority))
            sent += 1
        if rng.random() < 0.1:
            name = rng.choice(sorted(names))
            old, new = names[name]
            names[name] = (new, old)
            engine.register(new, new.uri)
            engine.forget(old.digest)
            counts["repointed"] += 1
        if asked and rng.random() < 0.05:
            victim = rng.choice(sorted(asked))
            engine.cancel(victim)
            compare(asked.pop(victim), got.pop(victim), expected, counts)
            counts["cancelled"] += 1
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            got[delta.request_id] += delta.tokens
            if delta.last:
                key = asked.pop(delta.request_id)
                compare(key, got.pop(delta.request_id), expected, counts)
                counts["finished"] += 1
        if sent % 100 == 0:
            engine.scheduler.check()
    return counts


def compare(
    key: tuple[str | None, int], tokens: list[int], expected: Answers, counts: Counter[str]
) -> None:
    """Counts the tokens, and the wrong ones among them. key: (digest, index of the prompt)."""
    counts["tokens"] += len(tokens)
    counts["wrong"] += sum(a != b for a, b in zip(tokens, expected[key], strict=False))


if __name__ == "__main__":
    main()
