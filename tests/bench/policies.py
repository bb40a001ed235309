"""Simulates parking against a baseline without it: `python -m tests.bench.policies --traces DIR`.

DIR contains Azure's LLM inference traces of 2023, as published. The first table runs slices of
them, and workloads that are hard on parking, under the policies `skip` and `ours`; ✓ and ✗ mark
whether `ours` meets its goals. The second table compares one memory for adapters and KV pages with
fixed divisions of the same bytes. Prints Markdown, the same for the same seeds.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from replica.simulation.cards import PAGE_BYTES
from replica.simulation.traces import read_trace
from replica.simulation.workload import Slo, WorkloadFigures, simulate
from replica.simulation.workload_file import Workload, parse

BASE: Mapping[str, Any] = {
    "card": "a10g-llama8b",
    "adapters": {"count": 256, "ranks": [16]},
    "popularity": {"zipf": 0.8},
    "base_share": 0.1,
}
APART = {"places": 17, "kv_pages": 2146}
MEMORY = 6 * 10**9


def traced(kind: str, rate: float, start: int = 4000, **changed: Any) -> dict[str, Any]:
    """A workload of 400 requests of a trace, starting at number `start`."""
    arrivals = {"trace": kind, "start": start, "requests": 400, "rate": rate}
    return {**BASE, "arrivals": arrivals, **changed}


def poisson(
    rate: float, requests: int, prompt: tuple[int, int], output: tuple[int, int], **changed: Any
) -> dict[str, Any]:
    return {
        **BASE,
        "arrivals": {"rate": rate, "requests": requests},
        "prompt_tokens": list(prompt),
        "output_tokens": list(output),
        **changed,
    }


def adapters(count: int, rank: int = 16) -> dict[str, Any]:
    return {"adapters": {"count": count, "ranks": [rank]}}


WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "conv 1.0": traced("conv", 1.0, **APART),
    "conv 1.3": traced("conv", 1.3, **APART),
    "conv 1.8": traced("conv", 1.8, **APART),
    "code 1.8": traced("code", 1.8, **APART),
    # Other parts of the two traces.
    "conv@0 1.3": traced("conv", 1.3, 0, **APART),
    "conv@9000 1.5": traced("conv", 1.5, 9000, **APART),
    "conv@15000 1.1": traced("conv", 1.1, 15000, **APART),
    "code@1000 2.5": traced("code", 2.5, 1000, **APART),
    "code@6000 1.5": traced("code", 1.5, 6000, **APART),
    # Places are scarce, pages are plentiful.
    "z1.1-4/32": poisson(
        0.55,
        500,
        (200, 800),
        (100, 500),
        places=4,
        kv_pages=6000,
        **adapters(32) | {"popularity": {"zipf": 1.1}},
    ),
    "uniform-2/64": poisson(
        0.12,
        200,
        (100, 400),
        (200, 600),
        places=2,
        kv_pages=4000,
        **adapters(64, 64) | {"popularity": "uniform", "base_share": 0.0},
    ),
    # A parked row that loses its pages must compute 15,000 tokens again.
    "moon15k": poisson(
        3.0,
        250,
        (14_000, 16_000),
        (200, 400),
        places=8,
        kv_pages=28_000,
        **adapters(64) | {"card": "h200-llama8b"},
    ),
    # Rows grow far beyond their first pages.
    "long-out": poisson(
        0.35,
        150,
        (100, 300),
        (1500, 2500),
        places=8,
        kv_pages=2146,
        popularity={"zipf": 0.5},
    ),
    "short-many": poisson(6.0, 600, (20, 100), (5, 30), places=8, kv_pages=2146),
    # Most adapters load from files, at a twentieth of the rate of host memory.
    "slowcopy": poisson(
        0.8,
        300,
        (200, 1000),
        (100, 300),
        places=8,
        kv_pages=3000,
        host_memory="1GB",
        **adapters(64, 64),
    ),
    "tinykv": poisson(1.0, 300, (200, 1000), (100, 300), places=17, kv_pages=500),
    "burst": poisson(20.0, 200, (200, 1000), (100, 300), places=8, kv_pages=2146),
}
SPLIT_RATES = (1.0, 1.2, 1.4)
SPLITS = (0.25, 0.5, 0.75)  # adapters' share of the memory


@dataclass(frozen=True, slots=True)
class Goal:
    """An upper bound on a figure of `ours`: `times` the figure of `skip`, or else `most`."""

    figure: str
    times: float | None = None
    most: float = 0.0

    def kept(self, ours: WorkloadFigures, skip: WorkloadFigures) -> bool:
        most = self.most if self.times is None else self.times * getattr(skip, self.figure)
        return bool(getattr(ours, self.figure) <= most)


GOALS = (
    Goal("ttft_mean_ms", times=1.0),
    Goal("e2e_mean_ms", times=1.15),
    Goal("makespan_s", times=1.05),
    Goal("computed_over_needed", most=1.1),
)
COLUMNS = {
    "ttft_mean_ms": "TTFT mean, s",
    "e2e_mean_ms": "E2E mean, s",
    "makespan_s": "all done after, s",
    "computed_over_needed": "computed ÷ needed",
    "ttft_p99_ms": "TTFT P99, s",
    "itl_max_ms": "ITL longest, s",
    "goodput": "goodput",
    "loads": "loads",
    "parks": "parks",
}


def played(traces: Path, seeds: int, job: tuple[Mapping[str, Any], str]) -> WorkloadFigures:
    """Simulates one job: a workload file's content and a policy."""
    file, policy = job
    workload = dataclasses.replace(parse(file), seeds=seeds)
    return simulate(workload, policy, recorded(workload, traces), Slo())


def recorded(workload: Workload, traces: Path) -> Sequence[Any]:
    arrivals = workload.arrivals
    if arrivals.trace is None:
        return []
    path = traces / f"AzureLLMInferenceTrace_{arrivals.trace}.csv"
    with path.open() as lines:
        found = read_trace(lines, str(path))
    return found[arrivals.start : arrivals.start + arrivals.requests]


def split(rate: float, to_adapters: float | None) -> dict[str, Any]:
    """to_adapters: adapters' share of the memory; None: adapters and pages share it."""
    file = traced("conv", rate, **adapters(64) | {"popularity": {"zipf": 1.0}})
    if to_adapters is None:
        return file | {"memory": MEMORY}
    pages = int(MEMORY * (1 - to_adapters) / PAGE_BYTES)
    return file | {"adapter_memory": int(MEMORY * to_adapters), "kv_pages": pages}


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rule(columns: int, left: int) -> str:
    return row(*["---"] * left, *["---:"] * (columns - left))


def shown(figures: WorkloadFigures, name: str) -> str:
    value = getattr(figures, name)
    if name in ("loads", "parks"):
        return f"{value:,.0f}"
    if name.endswith("_ms"):
        value /= 1e3
    return f"{value:,.2f}"


def policy_rows(name: str, skip: WorkloadFigures, ours: WorkloadFigures) -> Iterator[str]:
    marks = {g.figure: " ✓" if g.kept(ours, skip) else " **✗**" for g in GOALS}
    yield row(name, "skip", *(shown(skip, column) for column in COLUMNS))
    yield row("", "ours", *(shown(ours, column) + marks.get(column, "") for column in COLUMNS))


def split_row(rate: float, one: WorkloadFigures, *apart: WorkloadFigures) -> str:
    kept = one.ttft_p99_ms <= min(each.ttft_p99_ms for each in apart)
    cells = [shown(each, "ttft_p99_ms") for each in (one, *apart)]
    cells[0] += " ✓" if kept else " **✗**"
    return row(f"{rate}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=1, help="seeds to take the median over")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("names", nargs="*", help="workloads, or `split` (default: all)")
    given = parser.parse_args()
    names = given.names or [*WORKLOADS, "split"]
    if unknown := set(names) - {*WORKLOADS, "split"}:
        parser.error(f"{sorted(unknown)} are not among {[*WORKLOADS, 'split']}")
    named = [name for name in WORKLOADS if name in names]
    with ProcessPoolExecutor(given.jobs) as pool:
        play = partial(played, given.traces, given.seeds)
        policies = pool.map(play, [(WORKLOADS[n], p) for n in named for p in ("skip", "ours")])
        if named:
            print(row("workload", "policy", *COLUMNS.values()), rule(len(COLUMNS) + 2, 2), sep="\n")
        for name in named:
            print(*policy_rows(name, next(policies), next(policies)), sep="\n", flush=True)
        if "split" in names:
            parts = (None, *SPLITS)
            found = pool.map(
                play, [(split(r, part), "ours") for r in SPLIT_RATES for part in parts]
            )
            heads = ("one memory", *(f"{part:.0%} to adapters" for part in SPLITS))
            print("", row("TTFT P99, s, at requests/s", *heads), rule(len(parts) + 1, 1), sep="\n")
            for rate in SPLIT_RATES:
                print(split_row(rate, *(next(found) for _ in parts)), flush=True)


if __name__ == "__main__":
    main()
