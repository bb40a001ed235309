"""Simulates taking turns over a grid of loads: `python -m tests.bench.grid --traces DIR`.

Each cell is a workload of 500 requests for adapters of rank 16 on an H200, with so many places or
one memory for adapters and KV pages. It runs under the policies `skip`, `drain`, `ours` and
`resident`, with the same requests; one memory also runs divided. The load of a cell is a share of
what `skip` finishes a second there when all requests come at once. `cells` says how they are
chosen. Prints Markdown, the same for the same seeds: figures, the goals, and each miss. DIR
contains Azure's LLM inference traces of 2023, as published; without it, only Poisson cells run.
Takes ten minutes on two cores.
"""

import argparse
import dataclasses
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replica.simulation.cards import PAGE_BYTES
from replica.simulation.workload import Slo, WorkloadFigures, simulate
from replica.simulation.workload_file import Workload, parse
from tests.bench.policies import recorded, row, rule

REQUESTS = 500
AMPLE = 60_000  # KV pages
ADAPTERS = 512
POPULARITIES: Mapping[str, Any] = {
    "uniform": lambda count: "uniform",
    "zipf 0.8": lambda count: {"zipf": 0.8},
    "zipf 1.1": lambda count: {"zipf": 1.1},
    # Half of the requests are for one adapter.
    "one hot": lambda count: {"weights": [count - 1.0, *[1.0] * (count - 1)]},
}
# Where the slices of the traces begin.
STARTS = {"conv": 4000, "code": 4000}
SPLITS = (0.25, 0.5, 0.75)  # adapters' share of the memory
# All requests come at once.
AT_ONCE = 1e6
HEADS = (
    "places / adapters, load, lengths, pages, copies",
    "skip",
    "drain",
    "ours",
    "resident",
    "computed ÷ needed",
    "makespan ÷ skip's",
    "ITL longest, s",
    "best split",
    "missed",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """places: of adapters, or `16 GiB`, one memory for adapters and pages.
    load: share of what `skip` finishes a second when all requests come at once.
    pages: of KV; with one memory not used.
    copy: rate from host memory, in GB/s.
    """

    places: str
    adapters: int
    popularity: str
    load: float
    lengths: str
    pages: int
    copy: float

    @property
    def memory(self) -> int | None:
        """Bytes of one memory for adapters and pages; None if there are places."""
        size, _, unit = self.places.partition(" ")
        return int(size) * 2**30 if unit else None

    @property
    def name(self) -> str:
        pages = "" if self.memory else f", {'ample' if self.pages == AMPLE else self.pages} pages"
        return (
            f"{self.places} / {self.adapters} {self.popularity}, {self.load}, {self.lengths}{pages}"
            f", {self.copy} GB/s"
        )

    def workload(self, rate: float, split: float | None = None) -> Workload:
        """split: adapters' share of the memory; None if it is one, or there are places."""
        arrivals: dict[str, Any] = {"requests": REQUESTS, "rate": rate}
        if self.lengths != "poisson":
            arrivals |= {"trace": self.lengths, "start": STARTS[self.lengths]}
        file: dict[str, Any] = {
            "card": "h200-llama8b",
            "adapters": {"count": self.adapters, "ranks": [16]},
            "popularity": POPULARITIES[self.popularity](self.adapters),
            "arrivals": arrivals,
            "engine": {"prefix_cache": False},  # no prompts share a prefix
        }
        if self.memory is None:
            file |= {"places": int(self.places), "kv_pages": self.pages}
        elif split is None:
            file |= {"memory": self.memory}
        else:
            pages = int(self.memory * (1 - split) / PAGE_BYTES)
            file |= {"adapter_memory": int(self.memory * split), "kv_pages": pages}
        workload = parse(file)
        card = dataclasses.replace(workload.card, copy_bytes_per_s=self.copy * 1e9)
        return dataclasses.replace(workload, card=card)


AXES: Sequence[Sequence[Any]] = (
    ("4", "8", "16", "8 GiB", "16 GiB"),
    (8, 32, 128, ADAPTERS),
    tuple(POPULARITIES),
    (0.5, 0.8, 1.2),
    ("poisson", "conv", "code"),
    (AMPLE, 8192, 2146),
    (55.0, 2.6, 1.3),
)


def cells(count: int = 60) -> list[Cell]:
    """Those that were looked at first, the corners, and then what covers most pairs of values."""
    first = [
        Cell("4", 8, "uniform", 0.8, "poisson", AMPLE, 55.0),
        Cell("8", 32, "uniform", 0.8, "poisson", AMPLE, 55.0),
        Cell("8", 128, "zipf 1.1", 0.8, "poisson", AMPLE, 55.0),
        Cell("4", 32, "zipf 1.1", 0.8, "poisson", AMPLE, 55.0),
        Cell("8", 128, "zipf 1.1", 1.2, "poisson", AMPLE, 55.0),
    ]
    corners = [
        Cell(places, adapters, popularity, load, "poisson", pages, 55.0)
        for places, pages in (("4", AMPLE), ("4", 2146), ("16", AMPLE), ("8 GiB", AMPLE))
        for adapters in (8 if places == "4" else 32, ADAPTERS)
        for popularity, load in (("uniform", 0.5), ("zipf 1.1", 1.2))
    ]
    chosen = list(dict.fromkeys([*first, *corners]))
    every = [Cell(*values) for values in itertools.product(*AXES) if _scarce(*values[:2])]
    rng = random.Random("grid")
    covered = Counter(pair for cell in chosen for pair in _pairs(cell))
    while len(chosen) < count:
        # Pairs not covered yet count most, then those covered least.
        some = rng.sample(every, 200)
        best = max(some, key=lambda cell: sum(8.0 ** -covered[p] for p in _pairs(cell)))
        chosen.append(best)
        covered.update(_pairs(best))
    return chosen[:count]


def _scarce(places: str, adapters: int) -> bool:
    """True unless each adapter has a place. One memory also holds pages: they compete."""
    return not places.isdigit() or adapters > int(places)


def _pairs(cell: Cell) -> Iterator[tuple[Any, ...]]:
    values = list(enumerate(dataclasses.astuple(cell)))
    if cell.memory:
        values.pop(5)  # pages
    return itertools.combinations(values, 2)


@dataclass(frozen=True, slots=True)
class Found:
    """split: the best goodput of the same bytes divided; None if there are places."""

    skip: WorkloadFigures
    drain: WorkloadFigures
    ours: WorkloadFigures
    resident: WorkloadFigures
    split: float | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """One goal in one cell. value: of `ours`."""

    goal: str
    value: float
    bound: float
    most: bool = True  # else the least

    @property
    def kept(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound


def marks(cell: Cell, found: Found) -> Iterator[Mark]:
    ours, skip, drain = found.ours, found.skip, found.drain
    best = max(skip.goodput, drain.goodput)
    yield Mark("goodput", ours.goodput, 0.95 * best, most=False)
    yield Mark("TTFT P99", ours.ttft_p99_ms, skip.ttft_p99_ms)
    yield Mark("computed ÷ needed", ours.computed_over_needed, 1.02)
    yield Mark("makespan", ours.makespan_s, 1.05 * skip.makespan_s)
    if cell.load <= 0.8:
        yield Mark("E2E mean", ours.e2e_mean_ms, 1.1 * min(skip.e2e_mean_ms, drain.e2e_mean_ms))
    if found.split is not None:
        yield Mark("goodput of one memory", ours.goodput, found.split, most=False)


def at_once(cell: Cell, traces: Path | None) -> float:
    """Requests a second that `skip` finishes when all come at once."""
    return REQUESTS / played(cell, "skip", AT_ONCE, None, 1, traces).makespan_s


def played(
    cell: Cell, policy: str, rate: float, split: float | None, seeds: int, traces: Path | None
) -> WorkloadFigures:
    workload = dataclasses.replace(cell.workload(rate, split), seeds=seeds)
    coming = [] if traces is None else recorded(workload, traces)
    return simulate(workload, policy, coming, Slo())


def started(
    pool: ProcessPoolExecutor, cell: Cell, rate: float, seeds: int, traces: Path | None
) -> dict[str, Future[WorkloadFigures]]:
    given = cell.load * rate
    jobs = {
        policy: pool.submit(played, cell, policy, given, None, seeds, traces)
        for policy in ("ours", "skip", "drain", "resident")
    }
    for split in SPLITS if cell.memory else ():
        jobs[f"{split}"] = pool.submit(played, cell, "ours", given, split, seeds, traces)
    return jobs


def gathered(jobs: Mapping[str, Future[WorkloadFigures]]) -> Found:
    figures = {name: job.result() for name, job in jobs.items()}
    splits = [figures[f"{split}"].goodput for split in SPLITS if f"{split}" in figures]
    return Found(
        figures["skip"],
        figures["drain"],
        figures["ours"],
        figures["resident"],
        max(splits, default=None),
    )


def table_row(cell: Cell, found: Found) -> str:
    """goodput, E2E mean and TTFT P99 in seconds of each policy; and what is told of ours."""
    policies = (found.skip, found.drain, found.ours, found.resident)
    ours = found.ours
    return row(
        cell.name,
        *(
            f"{f.goodput:.2f}, {f.e2e_mean_ms / 1e3:.1f}, {f.ttft_p99_ms / 1e3:.1f}"
            for f in policies
        ),
        f"{ours.computed_over_needed:.2f}",
        f"{ours.makespan_s / found.skip.makespan_s:.2f}",
        f"{ours.itl_max_ms / 1e3:.1f}",
        "" if found.split is None else f"{found.split:.2f}",
        ", ".join(mark.goal for mark in marks(cell, found) if not mark.kept) or "✓",
    )


def summary(each: Mapping[Cell, Found]) -> Iterator[str]:
    kept: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    missed = []
    for cell, found in each.items():
        for mark in marks(cell, found):
            asked[mark.goal] += 1
            kept[mark.goal] += mark.kept
            if not mark.kept:
                bound = f"{'at most' if mark.most else 'at least'} {mark.bound:,.4g}"
                missed.append(f"- {cell.name}: {mark.goal} {mark.value:,.4g}, {bound}")
    yield from ("", row("goal", "kept"), rule(2, 1))
    yield from (row(goal, f"{kept[goal]} of {asked[goal]}") for goal in asked)
    yield from ("", f"Misses: {len(missed)}", *missed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=2, help="seeds to take the median over")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--cells", type=int, default=60, metavar="N", help="the first N only")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cells whose name contains TEXT"
    )
    given = parser.parse_args()
    chosen = [cell for cell in cells()[: given.cells] if given.only in cell.name]
    if given.traces is None:
        print("Without --traces: the cells with lengths from traces are left out.\n")
        chosen = [cell for cell in chosen if cell.lengths == "poisson"]
    print(
        "Each: goodput, E2E mean in s, TTFT P99 in s\n",
        row(*HEADS),
        rule(len(HEADS), 1),
        sep="\n",
    )
    each: dict[Cell, Found] = {}
    with ProcessPoolExecutor(given.jobs) as pool:
        rates = [pool.submit(at_once, cell, given.traces) for cell in chosen]
        jobs = []
        for cell, rate in zip(chosen, rates, strict=True):
            jobs.append(started(pool, cell, rate.result(), given.seeds, given.traces))
        for cell, begun in zip(chosen, jobs, strict=True):
            each[cell] = gathered(begun)
            print(table_row(cell, each[cell]), flush=True)
    print(*summary(each), sep="\n")


if __name__ == "__main__":
    main()
