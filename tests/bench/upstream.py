"""The published workloads on a real engine with a toy model, scaled down, at the card's pace.

    python -m tests.bench.upstream [TABLE …] [--runs N] [--threads N]     about 20 minutes

The toy computes every step, load and token, but takes other times than a card. So a step lasts at
least as long as on the table's card (`simulation/cards.py`), and a load as long as on the measured
servers: the engine and the loader wait for the difference. The output includes the share of steps
for which the toy was too slow, and the simulator's figures for the same requests at the same size.

15512's before and after differ only in blocking and overlapping loads. `ours` loads as slowly as
the measured servers. `FAST` is `ours` with copies at the card's rate, as from pinned memory.

`beside` measures what adapters cost the base model's requests: at the card's pace, and with a
larger toy at full speed.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.costs import Costs
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.adapters.arena import ALIGNMENT_BYTES
from replica.engine.engine import Engine
from replica.model.memory import divide
from replica.model.shape import ModelShape
from replica.scheduling.assembly import assemble
from replica.simulation.comparison import TITLES
from replica.simulation.published import published
from replica.simulation.simulator import Figures, RequestStats, Simulator, figures, median_figures
from replica.simulation.upstream import OURS, POLICIES, TABLES, Table
from tests.bench.paced import PacedLoads, PacedSteps
from tests.bench.replay import replay
from tests.bench.smaller import Pace, Requests, Size, engine_config, requests
from tests.bench.toys import toy_adapter, toy_model

ALL_BASE = "all base"
FAST = "ours, fast"
AS_THE_CARD = Size(hidden=64, layers=2, ranks=4, lengths=4, times=6, paced=True)
AS_FAST_AS_IT_GOES = Size(hidden=384, layers=4, ranks=16, lengths=8, times=3, paced=False)
_BESIDE_PLACES = 4
_ELEMENT_BYTES = 4

Streams = Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy's figures by stream, and the simulator's for the same requests.

    late: the share of steps that took longer than the card's, the largest of any run.
    """

    figures: Streams
    simulated: Streams
    late: float
    loads: int


@dataclass(frozen=True, slots=True)
class Result:
    """outcomes: by policy. same_tokens: each request got the same tokens under every policy."""

    title: str
    table: Table
    paced: bool
    outcomes: Mapping[str, Outcome]
    same_tokens: bool


def upstream(
    names: Sequence[str], runs: int, threads: int | None, report: Callable[[str], None]
) -> Iterator[Result]:
    """Runs tables. The policies of a table take turns, run by run. report: gets a progress line."""
    with _toys(AS_THE_CARD, threads) as toys:
        for name in names:
            yield _result(name, TABLES[name], (*POLICIES, FAST), toys, runs, report)


def beside(runs: int, threads: int | None, report: Callable[[str], None]) -> Iterator[Result]:
    """Runs base requests beside 16 adapters on 4 places, and the same requests all for base."""
    table = dataclasses.replace(TABLES["14795"], places=_BESIDE_PLACES)
    for size in (AS_THE_CARD, AS_FAST_AS_IT_GOES):
        title = f"{table.name} on {table.places} places"
        with _toys(size, threads) as toys:
            yield _result(title, table, ("ours", ALL_BASE), toys, runs, report)


def lines(result: Result) -> Iterator[str]:
    """One line of figures, in milliseconds, for each policy and stream of a table."""
    pace = "the card's pace" if result.paced else "the toy's own pace"
    yield (
        f"{result.title + ', ' + pace:35} {'TTFT mean':>9} {'median':>6} {'P99':>6} "
        f"{'E2E mean':>8} {'TPOT':>5} {'ITL max':>7} {'loads':>5}"
        + (f" {'late':>5} {'simulated: TTFT, E2E':>21}" if result.paced else "")
    )
    for policy, outcome in result.outcomes.items():
        for stream, f in outcome.figures.items():
            simulated = outcome.simulated[stream]
            yield (
                f"  {policy:26} {stream:6} {f.ttft_mean_ms:9.0f} {f.ttft_p50_ms:6.0f} "
                f"{f.ttft_p99_ms:6.0f} {f.e2e_mean_ms:8.0f} {f.tpot_p50_ms:5.1f} "
                f"{f.itl_max_ms:7.0f} {outcome.loads:5}"
            ) + (
                f" {outcome.late:5.1%} {simulated.ttft_mean_ms:14.0f} {simulated.e2e_mean_ms:6.0f}"
                if result.paced
                else ""
            )
    if ALL_BASE in result.outcomes:
        ours, base = (result.outcomes[name].figures["base"] for name in ("ours", ALL_BASE))
        ratio = ours.ttft_mean_ms / base.ttft_mean_ms
        yield f"  base TTFT beside adapters / with base alone: {ratio:.2f} (target 1.30 at most)"
    else:
        yield from (f"  {line}" for line in _directions(result))
        same = "the same" if result.same_tokens else "DIFFERENT"
        yield f"  tokens of all policies: {same}"


def _directions(result: Result) -> Iterator[str]:
    """Compares the change from before to after with the published change, and ours with both."""
    for stream, after in result.outcomes["after"].figures.items():
        before, ours = (result.outcomes[name].figures[stream] for name in ("before", "ours"))
        stated = [published(result.table.name, policy, stream) for policy in POLICIES[:2]]
        against = [
            f"; {TITLES[name]} {getattr(before, name):.0f} → {getattr(after, name):.0f}, published "
            f"{stated[0][name]:.0f} → {stated[1][name]:.0f}"
            for name in stated[0]
            if (stated[0][name] > stated[1][name]) != (getattr(before, name) > getattr(after, name))
        ]
        if stated[0]:
            held = len(stated[0]) - len(against)
            yield f"{stream}: {held} of {len(stated[0])} move as published{''.join(against)}"
        for name in ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms"):
            best, own = min(getattr(before, name), getattr(after, name)), getattr(ours, name)
            if own > best:
                yield f"{stream}: ours is behind in {TITLES[name]}: {own:.0f} against {best:.0f}"


class _Toys:
    """A toy model and its adapters, which are made on first use."""

    def __init__(self, directory: Path, size: Size, threads: int | None) -> None:
        self.size = size
        self.threads = threads
        self.model = str(directory / "model")
        self.shape: ModelShape = toy_model(
            directory / "model", size.hidden, size.layers, size.context
        )
        self._directory = directory
        self._versions: dict[tuple[str, int], Version] = {}

    def version(self, name: str, rank: int) -> Version:
        """The adapter `name`. rank: the published one."""
        rank = self.size.rank(rank)
        if (name, rank) not in self._versions:
            seed = len(self._versions)
            path = toy_adapter(self._directory / f"{name}-{rank}", self.shape, rank, seed)
            info = inspect(path, self.shape, rank)
            self._versions[name, rank] = Version(
                name, info.digest, path, info.rank, info.parameters
            )
        return self._versions[name, rank]


@contextmanager
def _toys(size: Size, threads: int | None) -> Iterator[_Toys]:
    with tempfile.TemporaryDirectory() as directory:
        yield _Toys(Path(directory), size, threads)


class _Server:
    """Runs one policy on one table, with a real engine and with the simulator."""

    def __init__(self, table: Table, policy: str, toys: _Toys) -> None:
        self._table = table
        self._toys = toys
        self._all_base = policy == ALL_BASE
        chosen = OURS if policy in (ALL_BASE, FAST) else table.policy(policy)
        card = table.card if policy == FAST else table.card.as_upstream()
        self._versions = {name: toys.version(name, rank) for name, rank in table.ranks.items()}
        largest = max(self._versions.values(), key=lambda version: version.parameters)
        image_bytes = largest.parameters * _ELEMENT_BYTES
        self._pace = Pace(card, toys.size, table.ranks[largest.name], image_bytes)
        self._config = dataclasses.replace(
            engine_config(table, chosen, toys.size, image_bytes + ALIGNMENT_BYTES),
            model=toys.model,
            threads=toys.threads,
        )
        self.late = 0.0
        self.loads = 0

    def run(self, seed: int) -> tuple[Streams, list[list[int]]]:
        """The figures, and the tokens of each request."""
        workload = self._requests(seed)
        digests: dict[str | None, str | None] = {None: None}
        ranks: dict[str | None, int] = {None: 0}
        for name, version in self._versions.items():
            digests[name] = version.digest
            ranks[version.digest] = self._table.ranks[name]
        woken = threading.Event()
        engine = Engine(self._config, woken.set)
        PacedLoads(engine, self._pace.copy_bytes_per_s)
        steps = None
        if self._toys.size.paced:
            steps = PacedSteps(engine, lambda rows: self._pace.step_s(rows, ranks))
        try:
            for version in self._versions.values():
                engine.register(version, version.uri)
            run = replay(engine, woken, workload.coming, workload.prompts, digests)
            if steps is not None:
                self.late = max(self.late, steps.late / engine.steps)
            self.loads = engine.report().loads
            return self._by_stream(run.records), run.tokens
        finally:
            engine.close()

    def simulated(self, seed: int) -> Streams:
        ranks: dict[str | None, int] = {None: 0} | dict(self._table.ranks.items())
        scheduler = assemble(
            self._config,
            context=self._toys.size.context,
            eos_tokens=frozenset(),
            memory=divide(self._config, self._toys.shape, _ELEMENT_BYTES),
            alignment=ALIGNMENT_BYTES,
            costs=Costs(),
        )
        for name, version in self._versions.items():
            size = version.parameters * _ELEMENT_BYTES
            scheduler.adapter_cache.register(name, version.uri, size, pinned=False, now_s=0.0)
        return self._by_stream(
            Simulator(scheduler, self._pace, ranks).run(self._requests(seed).coming)
        )

    def _requests(self, seed: int) -> Requests:
        return requests(self._table, self._toys.size, self._all_base, seed)

    def _by_stream(self, records: Sequence[RequestStats]) -> Streams:
        return {
            stream.name: figures([r for r in records if r.arrival.stream == stream.name])
            for stream in self._table.streams
        }


def _result(
    title: str,
    table: Table,
    policies: Sequence[str],
    toys: _Toys,
    runs: int,
    report: Callable[[str], None],
) -> Result:
    servers = {policy: _Server(table, policy, toys) for policy in policies}
    found: dict[str, list[Streams]] = {policy: [] for policy in policies}
    tokens: dict[str, list[list[list[int]]]] = {policy: [] for policy in policies}
    for seed in range(runs):  # the simulator uses the same seeds
        for policy, server in servers.items():
            start_s = time.monotonic()
            streams, own = server.run(seed)
            found[policy].append(streams)
            tokens[policy].append(own)
            report(f"{title} {policy} run {seed + 1}: {time.monotonic() - start_s:.1f} s")
    outcomes = {
        policy: Outcome(
            _medians(found[policy]),
            _medians([server.simulated(seed) for seed in range(runs)]),
            server.late,
            server.loads,
        )
        for policy, server in servers.items()
    }
    same = all(own == tokens[policies[0]] for own in tokens.values())
    return Result(title, table, toys.size.paced, outcomes, same)


def _medians(runs: Sequence[Streams]) -> Streams:
    return {stream: median_figures([run[stream] for run in runs]) for stream in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--runs", type=int, default=5, help="runs to take the median over")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := set(args.tables) - TABLES.keys():
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    for result in upstream(args.tables or list(TABLES), args.runs, args.threads, _report):
        print("", *lines(result), sep="\n", flush=True)
    if not args.tables or "14795" in args.tables:
        for result in beside(args.runs, args.threads, _report):
            print("", *lines(result), sep="\n", flush=True)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
