"""The published workloads on a real engine, small and fast enough for a CPU.

The shape of each workload is kept (how many adapters on how many places, how many requests run at
once, how long a copy takes against a step), its size is not: lengths are an eighth, rates
`_SPEEDUP` times as high, quantum and thresholds as much shorter, on a toy model.
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
from replica.engine import Engine
from replica.replay import Replay, replay
from replica.shape import ModelShape
from replica.toys import toy_adapter, toy_model
from replica.twin import Figures, Record, figures, median_figures
from replica.upstream import POLICIES, TABLES, Policy, Table
from replica.workloads import Arrival, Stream, arrivals

_LENGTHS = 8
_SPEEDUP = 8.0
# The toy is a sixteenth as wide as Llama-3.1-8B. Ranks shrink less, so that loads are still felt.
_RANKS = 8
_HIDDEN, _LAYERS, _CONTEXT = 256, 4, 512


@dataclass(frozen=True, slots=True)
class Result:
    """policy → stream → figures. same_tokens: every policy gave every request the same tokens."""

    table: str
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
        f"{result.table:22} {'TTFT mean':>10} {'median':>8} {'P99':>8} "
        f"{'E2E mean':>9} {'ITL max':>8} {'loads':>6}"
    )
    for policy, streams in result.figures.items():
        for stream, f in streams.items():
            yield (
                f"  {policy:10} {stream:9} {f.ttft_mean_ms:10.0f} {f.ttft_p50_ms:8.0f} "
                f"{f.ttft_p99_ms:8.0f} {f.e2e_mean_ms:9.0f} {f.itl_max_ms:8.0f} "
                f"{result.loads[policy]:6}"
            )
    if "all base" in result.figures:
        ours, base = result.figures["ours"]["base"], result.figures["all base"]["base"]
        ratio = ours.ttft_mean_ms / base.ttft_mean_ms
        yield f"  base TTFT beside adapters / with base alone: {ratio:.2f} (target 1.30 at most)"
    same = "the same" if result.same_tokens else "DIFFERENT"
    yield f"  tokens of all policies: {same}"


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
    policies = [*POLICIES, "all base"] if table.name == "14795" else list(POLICIES)
    each: dict[str, list[dict[str, Figures]]] = {policy: [] for policy in policies}
    tokens: dict[str, list[list[list[int]]]] = {policy: [] for policy in POLICIES}
    loads: dict[str, int] = {}
    for seed in range(runs + 1):
        for policy in policies:
            start_s = time.monotonic()
            run, loads[policy] = _run(table, policy, toys, seed)
            if seed == 0:
                continue  # warms up
            each[policy].append(_by_stream(table, run.records))
            if policy in tokens:
                tokens[policy].append(run.tokens)
            tell(f"{table.name} {policy} run {seed}: {time.monotonic() - start_s:.1f} s")
    medians = {
        policy: {
            stream.name: median_figures([f[stream.name] for f in found]) for stream in table.streams
        }
        for policy, found in each.items()
    }
    same = all(tokens[policy] == tokens["ours"] for policy in POLICIES)
    return Result(table.name, medians, same, loads)


def _run(table: Table, policy: str, toys: _Toys, seed: int) -> tuple[Replay, int]:
    streams = tuple(_scaled(s, policy == "all base") for s in table.streams)
    coming: list[Arrival] = arrivals(streams, seed)
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, 512) for _ in range(a.prompt_tokens)) for a in coming]
    versions = {name: toys.version(name, rank // _RANKS or 1) for name, rank in table.ranks.items()}
    woken = threading.Event()
    name = "ours" if policy == "all base" else policy
    engine = Engine(_config(table, table.policy(name), name, toys, versions), wake=woken.set)
    digests: dict[str | None, str | None] = {None: None}
    for adapter, version in versions.items():
        engine.register(version, version.uri)
        digests[adapter] = version.digest
    try:
        return replay(engine, woken, coming, prompts, digests), engine.report().loads
    finally:
        engine.close()


def _config(
    table: Table, policy: Policy, name: str, toys: _Toys, versions: Mapping[str, Version]
) -> EngineConfig:
    largest = max(version.parameters for version in versions.values()) * 4
    packed = table.packed and name == "ours"
    slots = len(versions) if packed else table.places + (not policy.switches.base_pinned)
    return EngineConfig(
        toys.model,
        device="cpu",
        threads=toys.threads,
        adapter_memory=table.places * (largest + 256),
        host_memory=0,
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
        quantum_s=policy.sharing.quantum_s / _SPEEDUP,
        head_start_s=policy.sharing.head_start_s / _SPEEDUP,
        drain_wait_threshold_s=policy.sharing.drain_wait_threshold_s / _SPEEDUP,
        eviction="cost" if policy.eviction == "cost" else "lru",
        prefix_cache=False,
    )


def _scaled(stream: Stream, base: bool) -> Stream:
    return dataclasses.replace(
        stream,
        rate=stream.rate * _SPEEDUP,
        prompt_tokens_max=stream.prompt_tokens_max // _LENGTHS,
        output_tokens_max=stream.output_tokens_max // _LENGTHS,
        adapters=() if base else stream.adapters,
    )


def _by_stream(table: Table, records: list[Record]) -> dict[str, Figures]:
    return {
        stream.name: figures([r for r in records if r.arrival.stream == stream.name])
        for stream in table.streams
    }
