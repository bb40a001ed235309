"""Page copies on a live CPU replica: `python -m tests.bench.page_copies`.

Two workloads on a toy model in fp32, each with ample KV pages and with pages for a third of its
rows, with page copies and without:

    turns    adapters take turns in one place; the rows of those that wait are parked. A turn and
             the targets are so many steps, whose time a first run measures.
    growth   rows of the base model grow until pages run out

No pages are left free for growth (`growth_outputs`). Otherwise nobody would take turns: the rows of
`turns` together need three times the device's pages, and rows begin to take turns only where twice
these are enough (`PageDemand.met`).

Runs alternate and the median counts, since other processes disturb a CPU. Exits with 1 if an answer
differs from that with ample pages, or a goal is missed. `growth` has no goal for tokens a second:
its rows begin together and are equally long, so towards their end only four of six have pages. The
rows that run at once, tokens ÷ steps, show how much that costs, whatever disturbs the CPU.
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
from typing import Any

from cluster.config import EngineConfig
from cluster.values import Version
from replica.engine.engine import Engine
from replica.model.memory import kv_page_bytes
from replica.model.shape import ModelShape
from replica.scheduling.request import NewRequest, Sampling
from replica.scheduling.timeline import Event
from tests.bench.toys import toy_model, toy_version

ADAPTERS, RANK = 3, 8
PAGE_TOKENS = 16
COMPUTED_MAX, RATE_MIN = 1.02, 0.95


@dataclass(frozen=True, slots=True)
class Load:
    """rows: that arrive at once. batch: of these run at once, at most.

    row_pages: for each row; it ends one page below, since admission leaves a margin for each.
    """

    name: str
    adapters: int
    rows: int
    batch: int
    prompt: int
    row_pages: int
    rate_min: float | None

    @property
    def outputs(self) -> int:
        return (self.row_pages - 1) * PAGE_TOKENS - self.prompt

    def settings(self, step_s: float) -> dict[str, Any]:
        if not self.adapters:
            return {}
        times = {"quantum_s": 30.0, "ttft_target_s": 45.0, "tpot_target_s": 15.0}
        return {"slots_max": 1, **{name: steps * step_s for name, steps in times.items()}}


def loads(scale: float) -> Sequence[Load]:
    pages = max(int(16 * scale), 4)
    return (
        Load("turns", ADAPTERS, 12, 4, 48, pages, RATE_MIN),
        Load("growth", 0, 12, 6, 16, pages, None),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """rows: that ran at once, on average."""

    answers: dict[str, list[int]]
    tokens_per_s: float
    step_s: float
    rows: float
    computed_over_needed: float
    parks: int
    preemptions: int
    out: int
    back: int


def run(
    model: Path, shape: ModelShape, versions: Sequence[Version], load: Load, **settings: Any
) -> Run:
    config = EngineConfig(
        str(model),
        device="cpu",
        dtype="float32",
        threads=1,
        seed=0,
        batch_rows_max=load.batch,
        page_tokens=PAGE_TOKENS,
        context_tokens_max=load.row_pages * PAGE_TOKENS,
        adapter_memory=2**24,
        growth_outputs=0.0,
        **settings,
    )
    with closing(Engine(config)) as engine:
        for version in versions:
            engine.register(version, version.uri)
        sampling = Sampling(max_tokens=load.outputs, temperature=0.0, ignore_eos=True)
        got: dict[str, list[int]] = {}
        start_s = time.monotonic()
        for i in range(load.rows):
            prompt = tuple((7 * i + 3 * j) % shape.vocab for j in range(load.prompt))
            digest = versions[i % load.adapters].digest if load.adapters else None
            engine.add(NewRequest(f"r{i}", prompt, sampling, digest))
            got[f"r{i}"] = []
        while engine.has_work:
            for delta in engine.step():
                assert delta.error is None, delta.error
                got[delta.request_id] += delta.tokens
        took_s = time.monotonic() - start_s
        scheduler = engine.scheduler
        counts, copies = scheduler.timelines.counts, scheduler.page_copies
        return Run(
            got,
            sum(map(len, got.values())) / took_s,
            took_s / engine.steps,
            sum(map(len, got.values())) / engine.steps,
            scheduler.growth.over_needed,
            counts[Event.PARKED],
            counts[Event.PREEMPTED],
            copies.out,
            copies.back,
        )


def compare(
    model: Path, shape: ModelShape, versions: Sequence[Version], load: Load, repeats: int
) -> bool:
    """Prints the load's rows of the table. True if its goals are met."""
    page = kv_page_bytes(EngineConfig(str(model), page_tokens=PAGE_TOKENS), shape, 4)
    ample = load.rows * load.row_pages * page
    settings: dict[str, dict[str, Any]] = {
        "ample pages": {"kv_memory": 2 * ample, "host_kv_memory": ample},
        "a third": {"kv_memory": ample // 3, "host_kv_memory": ample},
        "a third, no copies": {"kv_memory": ample // 3, "page_copies": False},
    }
    runs: dict[str, list[Run]] = {name: [] for name in settings}
    for _ in range(2):  # the first one warms up
        first = run(model, shape, versions, load, **settings["ample pages"])
    for _ in range(repeats):
        for name, kv in settings.items():
            times = load.settings(first.step_s)
            runs[name].append(run(model, shape, versions, load, **times, **kv))
    wanted = runs["ample pages"][0].answers
    rates = {name: statistics.median(r.tokens_per_s for r in runs[name]) for name in settings}
    for name, found in runs.items():
        last = max(found, key=lambda r: r.computed_over_needed)
        print(
            f"{load.name:8}{name:20}{rates[name]:10.0f}{rates[name] / rates['ample pages']:8.2f}"
            f"{last.rows:6.2f}"
            f"{last.computed_over_needed:10.3f}{last.parks:7}{last.preemptions:9}"
            f"{last.out:6}{last.back:6}  "
            f"{'equal' if all(r.answers == wanted for r in found) else 'DIFFERENT'}",
            flush=True,
        )
    kept = runs["a third"]
    met = all(r.answers == wanted for name in runs for r in runs[name])
    met &= all(r.computed_over_needed <= COMPUTED_MAX and r.back > 0 for r in kept)
    met &= all(r.parks > 0 for r in kept if load.adapters)
    if load.rate_min is not None:
        met &= rates["a third"] >= load.rate_min * rates["ample pages"]
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    # Shorter rows end before a turn is over, where an adapter takes many steps to load.
    parser.add_argument("--scale", type=float, default=3.0, help="of the rows' lengths")
    options = parser.parse_args()
    print(
        f"{'load':8}{'KV pages':20}{'tokens/s':>10}{'÷ ample':>8}{'rows':>6}{'computed':>10}"
        f"{'parks':>7}{'preempt':>9}{'out':>6}{'back':>6}  answers"
    )
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "base"
        shape = toy_model(model, hidden=256, layers=4, context=1024)
        root = Path(directory)
        versions = [toy_version(root / f"a{n}", shape, RANK, n) for n in range(ADAPTERS)]
        met = [
            compare(model, shape, versions, load, options.repeats) for load in loads(options.scale)
        ]
    print(
        f"goals: equal answers, computed ÷ needed ≤ {COMPUTED_MAX}, "
        f"tokens/s of turns ≥ {RATE_MIN} × ample: {'met' if all(met) else 'MISSED'}"
    )
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
