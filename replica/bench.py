"""The published workloads on a real engine, small and fast enough for a CPU.

The shape of each workload is kept, its size is not: lengths are an eighth, on a toy model, and
everything that is a time is `scale` times shorter (gaps between arrivals, quantum, thresholds,
loads). The scale of a table is found first: with it, and with the base model in the place of all
adapters, a request takes as long against the gaps between arrivals as it does on the table's card
(`twin.py`). A load takes, for every policy alike, what the measured servers' took: the loader waits
for the rest of that time, as it would for a bus, and leaves the cores alone.

15512 before and after is blocking against overlapping, all else equal.
"""

import dataclasses
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapter_files import inspect
from replica.comparison import TITLES
from replica.engine import Engine
from replica.hardware import image_bytes
from replica.published import published
from replica.replay import Replay, replay
from replica.shape import ModelShape
from replica.toys import toy_adapter, toy_model
from replica.twin import Figures, Record, figures, median_figures
from replica.upstream import OURS, POLICIES, TABLES, Table
from replica.upstream import replay as simulate
from replica.workloads import Arrival, Stream, arrivals

ALL_BASE = "all base"
_LENGTHS = 8
_SCALE_ROUNDS = 6
# The toy is a sixteenth as wide as Llama-3.1-8B, and so are the ranks.
_RANKS = 16
_HIDDEN, _LAYERS, _CONTEXT = 256, 4, 512


@dataclass(frozen=True, slots=True)
class Result:
    """policy → stream → figures. same_tokens: every policy gave every request the same tokens.

    scale: how many times shorter everything was that is a time.
    """

    table: Table
    scale: float
    figures: Mapping[str, Mapping[str, Figures]]
    same_tokens: bool
    loads: Mapping[str, int]


def upstream(
    names: Sequence[str], runs: int, threads: int | None, tell: Callable[[str], None]
) -> Iterator[Result]:
    """tell: gets a line about each run. The policies take turns, run by run."""
    with tempfile.TemporaryDirectory() as directory:
        toys = _Toys(Path(directory), threads)
        for name in names:
            yield _table(TABLES[name], toys, runs, tell)


def lines(result: Result) -> Iterator[str]:
    """The figures of one table, in milliseconds, a policy and stream a line."""
    yield (
        f"{result.table.name:22} {'TTFT mean':>10} {'median':>8} {'P99':>8} "
        f"{'E2E mean':>9} {'TPOT p50':>8} {'ITL max':>8} {'loads':>6}"
    )
    for policy, streams in result.figures.items():
        for stream, f in streams.items():
            yield (
                f"  {policy:13} {stream:6} {f.ttft_mean_ms:10.0f} {f.ttft_p50_ms:8.0f} "
                f"{f.ttft_p99_ms:8.0f} {f.e2e_mean_ms:9.0f} {f.tpot_p50_ms:8.1f} "
                f"{f.itl_max_ms:8.0f} {result.loads[policy]:6}"
            )
    yield f"  times {result.scale:.1f} times shorter than on the card"
    yield from (f"  {line}" for line in _directions(result))
    if ALL_BASE in result.figures:
        ours, base = result.figures["ours"]["base"], result.figures[ALL_BASE]["base"]
        ratio = ours.ttft_mean_ms / base.ttft_mean_ms
        yield f"  base TTFT beside adapters / with base alone: {ratio:.2f} (target 1.30 at most)"
    same = "the same" if result.same_tokens else "DIFFERENT"
    yield f"  tokens of all policies: {same}"


def _directions(result: Result) -> Iterator[str]:
    """Whether upstream's change moved its figures as published, and where ours is behind it."""
    for stream, after in result.figures["after"].items():
        before, ours = result.figures["before"][stream], result.figures["ours"][stream]
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
    """One model; adapters by rank and number, made when first asked for."""

    def __init__(self, directory: Path, threads: int | None) -> None:
        self.model = str(directory / "model")
        self.threads = threads
        self.shape: ModelShape = toy_model(directory / "model", _HIDDEN, _LAYERS, _CONTEXT)
        self._directory = directory
        self._versions: dict[tuple[str, int], Version] = {}

    def version(self, name: str, rank: int) -> Version:
        if (name, rank) not in self._versions:
            seed = len(self._versions)
            path = toy_adapter(self._directory / f"{name}-{rank}", self.shape, rank, seed)
            info = inspect(path, self.shape, rank)
            self._versions[name, rank] = Version(
                name, info.digest, path, info.rank, info.parameters
            )
        return self._versions[name, rank]


def _table(table: Table, toys: _Toys, runs: int, tell: Callable[[str], None]) -> Result:
    scale = _scale(table, toys, tell)
    policies = list(POLICIES)
    if any(stream.name == "base" for stream in table.streams):
        policies.append(ALL_BASE)
    each: dict[str, list[dict[str, Figures]]] = {policy: [] for policy in policies}
    tokens: dict[str, list[list[list[int]]]] = {policy: [] for policy in policies}
    loads: dict[str, int] = {}
    for seed in range(runs):  # those of the simulator
        for policy in policies:
            start_s = time.monotonic()
            run, loads[policy] = _run(table, policy, toys, seed, scale)
            each[policy].append(_by_stream(table, run.records))
            tokens[policy].append(run.tokens)
            tell(f"{table.name} {policy} run {seed + 1}: {time.monotonic() - start_s:.1f} s")
    medians = {
        policy: {
            stream.name: median_figures([f[stream.name] for f in found]) for stream in table.streams
        }
        for policy, found in each.items()
    }
    same = all(tokens[policy] == tokens["ours"] for policy in policies if policy != ALL_BASE)
    return Result(table, scale, medians, same, loads)


def _scale(table: Table, toys: _Toys, tell: Callable[[str], None]) -> float:
    """Found from above and below by turns: a request takes longer the closer the others come."""
    simulated = simulate(table.all_base(), "ours", range(3))
    wanted_s = sum(simulated.median(s.name).e2e_mean_ms for s in table.streams) / 1e3
    scale = float(_LENGTHS)
    for _ in range(_SCALE_ROUNDS):
        run, _ = _run(table, ALL_BASE, toys, 0, scale)
        by_stream = _by_stream(table, run.records)
        found_s = sum(f.e2e_mean_ms for f in by_stream.values()) / 1e3
        tell(f"{table.name} times {scale:.1f} times shorter: {wanted_s / found_s:.1f} wanted")
        scale *= (wanted_s / found_s / scale) ** (1 / 3)
    return scale


def _run(table: Table, policy: str, toys: _Toys, seed: int, scale: float) -> tuple[Replay, int]:
    streams = tuple(_scaled(s, scale, policy == ALL_BASE) for s in table.streams)
    coming: list[Arrival] = arrivals(streams, seed)
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, 512) for _ in range(a.prompt_tokens)) for a in coming]
    versions = {name: toys.version(name, rank // _RANKS or 1) for name, rank in table.ranks.items()}
    woken = threading.Event()
    engine = Engine(_config(table, policy, toys, versions, scale), wake=woken.set)
    digests: dict[str | None, str | None] = {None: None}
    for adapter, version in versions.items():
        engine.register(version, version.uri)
        digests[adapter] = version.digest
    try:
        return replay(engine, woken, coming, prompts, digests), engine.report().loads
    finally:
        engine.close()


def _config(
    table: Table, name: str, toys: _Toys, versions: Mapping[str, Version], scale: float
) -> EngineConfig:
    policy = OURS if name == ALL_BASE else table.policy(name)
    largest = max(version.parameters for version in versions.values()) * 4
    load_s = table.card.as_upstream().copy_s(image_bytes(max(table.ranks.values()))) / scale
    packed = table.packed and not policy.upstream
    slots = len(versions) if packed else table.places + (not policy.switches.base_pinned)
    return EngineConfig(
        toys.model,
        device="cpu",
        threads=toys.threads,
        adapter_memory=table.places * (largest + 256),
        host_memory=len(versions) * (largest + 256),
        loads_in_flight_max=1 if policy.upstream else 8,
        load_bytes_per_s=int(largest / load_s),
        slots_max=slots,
        directory_slots=64,
        batch_rows_max=64,
        step_tokens_max=1024,
        queue_max=10_000,
        base_slot="pinned" if policy.switches.base_pinned else "shared",
        on_miss="skip" if policy.switches.skip else "block",
        overlap=policy.switches.overlap,
        prefetch_depth=policy.switches.prefetch_depth,
        park=policy.sharing.park,
        quantum_s=policy.sharing.quantum_s / scale,
        head_start_s=policy.sharing.head_start_s / scale,
        drain_wait_threshold_s=policy.sharing.drain_wait_threshold_s / scale,
        eviction="cost" if policy.eviction == "cost" else "lru",
        prefix_cache=False,
    )


def _scaled(stream: Stream, scale: float, base: bool) -> Stream:
    return dataclasses.replace(
        stream,
        rate=stream.rate * scale,
        prompt_tokens_max=stream.prompt_tokens_max // _LENGTHS,
        output_tokens_max=stream.output_tokens_max // _LENGTHS,
        adapters=() if base else stream.adapters,
    )


def _by_stream(table: Table, records: list[Record]) -> dict[str, Figures]:
    return {
        stream.name: figures([r for r in records if r.arrival.stream == stream.name])
        for stream in table.streams
    }
