"""Conversations whose KV pages the device cannot keep: `python -m tests.bench.conversations`.

Users talk in turn to three adapters and the base model of a toy in fp32, on a live CPU engine. Each
prompt is the whole conversation so far and some new words. The device's pages hold a third of all
conversations, so that its prefix cache has forgotten a user's when the next turn comes. With and
without a prefix cache in host memory; runs alternate, and the median counts. Exits with 1 if an
answer differs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cluster.config import EngineConfig
from cluster.values import Version
from replica.engine.engine import Engine
from replica.model.memory import kv_page_bytes
from replica.model.shape import ModelShape
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.toys import toy_model, toy_version

ADAPTERS, RANK = 3, 8
PAGE_TOKENS = 16
USERS, TURNS = 12, 5
FIRST, WORDS, ANSWER = 400, 60, 12


@dataclass(frozen=True, slots=True)
class Run:
    """ttfts_s: of all turns but the first. computed: tokens of prompts."""

    answers: list[list[int]]
    ttfts_s: list[float]
    computed: int
    back: int


def run(model: str, shape: ModelShape, versions: Sequence[Version], host: bool) -> Run:
    longest = FIRST + TURNS * (WORDS + ANSWER) + PAGE_TOKENS
    page = kv_page_bytes(EngineConfig(model, page_tokens=PAGE_TOKENS), shape, 4)
    all_pages = USERS * -(-longest // PAGE_TOKENS)
    config = EngineConfig(
        model,
        device="cpu",
        dtype="float32",
        threads=1,
        seed=0,
        page_tokens=PAGE_TOKENS,
        context_tokens_max=longest,
        adapter_memory=2**24,
        kv_memory=all_pages // 3 * page,
        host_kv_memory=2 * all_pages * page if host else 0,
    )
    answers, ttfts_s, computed = [], [], 0
    with closing(Engine(config)) as engine:
        for version in versions:
            engine.register(version, version.uri)
        digests = [None, *(version.digest for version in versions)]
        said = [[(11 * user + 3 * i) % shape.vocab for i in range(FIRST)] for user in range(USERS)]
        for turn in range(TURNS):
            for user, words in enumerate(said):
                words += [(5 * user + 7 * i + turn) % shape.vocab for i in range(WORDS)]
                first_s, cached, answer = ask(engine, words, digests[user % len(digests)])
                answers.append(answer)
                words += answer
                computed += len(words) - len(answer) - cached
                if turn:
                    ttfts_s.append(first_s)
        return Run(answers, ttfts_s, computed, engine.scheduler.page_copies.back)


def ask(engine: Engine, words: Sequence[int], digest: str | None) -> tuple[float, int, list[int]]:
    """(TTFT, cached tokens of the prompt, answer)."""
    sampling = Sampling(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    start_s = time.perf_counter()
    engine.add(NewRequest("only", tuple(words), sampling, digest))
    first_s, cached, answer = 0.0, 0, list[int]()
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            if not answer:
                first_s = time.perf_counter() - start_s
            cached += delta.cached_tokens
            answer += delta.tokens
    return first_s, cached, answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "base"
        shape = toy_model(model, hidden=256, layers=4, context=1024)
        root = Path(directory)
        versions = [toy_version(root / f"a{n}", shape, RANK, n) for n in range(ADAPTERS)]
        run(str(model), shape, versions, host=True)  # warms up
        runs: dict[bool, list[Run]] = {False: [], True: []}
        for _ in range(options.repeats):
            for host, found in runs.items():
                found.append(run(str(model), shape, versions, host))
    wanted = runs[False][0].answers
    means_ms = {
        host: statistics.median(statistics.fmean(r.ttfts_s) * 1e3 for r in found)
        for host, found in runs.items()
    }
    print(f"{USERS} conversations of {TURNS} turns, pages for a third of them")
    print(f"{'':18}{'TTFT mean':>10}{'prompt tokens computed':>24}{'pages back':>12}")
    for host, found in runs.items():
        print(
            f"{'host memory' if host else 'device alone':18}{means_ms[host]:7.1f} ms"
            f"{statistics.median(r.computed for r in found):24.0f}"
            f"{statistics.median(r.back for r in found):12.0f}"
        )
    equal = all(r.answers == wanted for found in runs.values() for r in found)
    print(
        f"TTFT {means_ms[True] / means_ms[False]:.2f} ×, answers {'equal' if equal else 'DIFFER'}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
