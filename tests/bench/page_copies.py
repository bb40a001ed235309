"""Page copies on a live CPU replica: `python -m tests.bench.page_copies`.

Two workloads on a toy model in fp32, each with ample KV pages and with pages for a third of its
rows, with page copies and without:

    turns    adapters take turns in one place; the rows of those that wait are parked. A turn and
             the targets are so many steps, whose time a first run measures.
    growth   rows of the base model grow until pages run out

No pages are left free for growth (`growth_outputs`). Otherwise nobody would take turns: the rows of
`turns` together need three times the device's pages, and rows begin to take turns only where twice
these are enough (`PageDemand.met`).

The three engines of a load step in turn, each on its own clock, so that what slows the processor
for a while slows all of them. Exits with 1 if an answer differs from that with ample pages, or a
goal is missed. `growth` has no goal for tokens a second: its rows begin together and are equally
long, so towards their end only four of six have pages. The rows that run at once, tokens ÷ steps,
show how much that costs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
AMPLE, THIRD = "ample pages", "a third"


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


class Running:
    """An engine with a load. seconds: that its steps took."""

    def __init__(
        self,
        model: Path,
        shape: ModelShape,
        versions: Sequence[Version],
        load: Load,
        **settings: Any,
    ) -> None:
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
        self.engine = Engine(config)
        self.answers: dict[str, list[int]] = {}
        self.seconds = 0.0
        for version in versions:
            self.engine.register(version, version.uri)
        sampling = Sampling(max_tokens=load.outputs, temperature=0.0, ignore_eos=True)
        for i in range(load.rows):
            prompt = tuple((7 * i + 3 * j) % shape.vocab for j in range(load.prompt))
            digest = versions[i % load.adapters].digest if load.adapters else None
            self.engine.add(NewRequest(f"r{i}", prompt, sampling, digest))
            self.answers[f"r{i}"] = []

    def step(self) -> None:
        start_s = time.monotonic()
        deltas = self.engine.step()
        self.seconds += time.monotonic() - start_s
        for delta in deltas:
            assert delta.error is None, delta.error
            self.answers[delta.request_id] += delta.tokens

    def end(self) -> Run:
        scheduler = self.engine.scheduler
        counts, copies = scheduler.timelines.counts, scheduler.page_copies
        tokens = sum(map(len, self.answers.values()))
        return Run(
            self.answers,
            tokens / self.seconds,
            self.seconds / self.engine.steps,
            tokens / self.engine.steps,
            scheduler.growth.over_needed,
            counts[Event.PARKED],
            counts[Event.PREEMPTED],
            copies.out,
            copies.back,
        )


def run(
    model: Path,
    shape: ModelShape,
    versions: Sequence[Version],
    load: Load,
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Run]:
    """One engine for each of the settings, which step in turn until the last has ended."""
    with ExitStack() as stack:
        all_running = {}
        for name, chosen in settings.items():
            all_running[name] = Running(model, shape, versions, load, **chosen)
            stack.callback(all_running[name].engine.close)
        while busy := [r for r in all_running.values() if r.engine.has_work]:
            for running in busy:
                running.step()
        return {name: running.end() for name, running in all_running.items()}


def compare(
    model: Path, shape: ModelShape, versions: Sequence[Version], load: Load, repeats: int
) -> bool:
    """Prints the load's rows of the table. True if its goals are met."""
    page = kv_page_bytes(EngineConfig(str(model), page_tokens=PAGE_TOKENS), shape, 4)
    ample = load.rows * load.row_pages * page
    settings: dict[str, dict[str, Any]] = {
        AMPLE: {"kv_memory": 2 * ample, "host_kv_memory": ample},
        THIRD: {"kv_memory": ample // 3, "host_kv_memory": ample},
        "a third, no copies": {"kv_memory": ample // 3, "page_copies": False},
    }
    for _ in range(2):  # the first one warms up
        first = run(model, shape, versions, load, {AMPLE: settings[AMPLE]})[AMPLE]
    times = load.settings(first.step_s * len(settings))
    timed = {name: {**times, **chosen} for name, chosen in settings.items()}
    runs = [run(model, shape, versions, load, timed) for _ in range(repeats)]
    wanted = runs[0][AMPLE].answers
    rates = {
        name: statistics.median(r[name].tokens_per_s / r[AMPLE].tokens_per_s for r in runs)
        for name in settings
    }
    for name, rate in rates.items():
        found = [r[name] for r in runs]
        last = max(found, key=lambda r: r.computed_over_needed)
        tokens_per_s = statistics.median(r.tokens_per_s for r in found)
        print(
            f"{load.name:8}{name:20}{tokens_per_s:10.0f}{rate:8.2f}{last.rows:6.2f}"
            f"{last.computed_over_needed:10.3f}{last.parks:7}{last.preemptions:9}"
            f"{last.out:6}{last.back:6}  "
            f"{'equal' if all(r.answers == wanted for r in found) else 'DIFFERENT'}",
            flush=True,
        )
    kept = [r[THIRD] for r in runs]
    met = all(one.answers == wanted for r in runs for one in r.values())
    met &= all(r.computed_over_needed <= COMPUTED_MAX and r.back > 0 for r in kept)
    met &= all(r.parks > 0 for r in kept if load.adapters)
    if load.rate_min is not None:
        met &= rates[THIRD] >= load.rate_min
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
