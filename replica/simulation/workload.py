"""Simulates one workload under each policy: the engine's own scheduler on a virtual clock."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from cluster.config import EngineConfig
from cluster.costs import Costs
from cluster.errors import ConfigError
from replica.scheduling.assembly import Division, assemble
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from replica.simulation.cards import PAGE_BYTES, Card, image_bytes
from replica.simulation.simulator import RequestStats, Simulator, percentile
from replica.simulation.traces import Recorded
from replica.simulation.workload_file import Workload, adapter_name, arrivals

_ALIGNMENT_BYTES = 256
_PAGE_TOKENS = 16
_HOST_KV_BYTES = 16 * 2**30
# Of the model that the cards describe.
_CONTEXT = 131_072
# What a policy sets in the engine's configuration, over the workload file. With `resident` every
# adapter has a place, and there are as many KV pages as with the other policies.
POLICIES: Mapping[str, Mapping[str, object]] = {
    "ours": {},
    "skip": {"park": False},
    "drain": {"park": False, "drain_wait_threshold_s": 3.0},
    "resident": {"park": False},
}


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets that a request must meet to count for goodput. None: what scheduling aims at."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkloadFigures:
    """goodput: share of requests that met both targets.
    computed_over_needed: tokens computed ÷ tokens needed; 1 if none was computed twice.
    """

    goodput: float
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    e2e_mean_ms: float
    e2e_p99_ms: float
    itl_max_ms: float
    makespan_s: float
    computed_over_needed: float
    loads: float
    parks: float


def simulate(
    workload: Workload, policy: str, recorded: Sequence[Recorded], slo: Slo, check: bool = False
) -> WorkloadFigures:
    """The median of each figure over the seeds. check: check the invariants after each step."""
    found = [_run(workload, policy, recorded, slo, seed, check) for seed in range(workload.seeds)]
    return WorkloadFigures(
        **{
            f.name: statistics.median(getattr(each, f.name) for each in found)
            for f in fields(WorkloadFigures)
        }
    )


def table(found: Mapping[str, WorkloadFigures]) -> Iterator[str]:
    """A row for each figure and a column for each policy, as text."""
    yield f"{'':22}" + "".join(f"{policy:>12}" for policy in found)
    for name in (f.name for f in fields(WorkloadFigures)):
        values = [getattr(each, name) for each in found.values()]
        whole = name in ("loads", "parks")
        cells = (f"{value:,.{0 if whole or value >= 100 else 2}f}" for value in values)
        yield f"{name:22}" + "".join(f"{cell:>12}" for cell in cells)


def _run(
    workload: Workload,
    policy: str,
    recorded: Sequence[Recorded],
    slo: Slo,
    seed: int,
    check: bool,
) -> WorkloadFigures:
    division, context = _divide(workload, policy, recorded)
    config = _config(workload, policy)
    host_pages = (config.host_kv_memory or 0) // division.page_bytes
    division = dataclasses.replace(division, host_pages=host_pages)
    scheduler = _scheduler(workload, config, division, context)
    ranks: dict[str | None, int] = {None: 0}
    ranks |= {adapter_name(i): r for i, r in enumerate(workload.ranks)}
    coming = arrivals(workload, recorded, context, seed)
    simulator = Simulator(
        scheduler, workload.card, ranks, check=check, depth=config.plan_depth or 2
    )
    records = simulator.run(coming)
    ttft_s = config.ttft_target_s if slo.ttft_s is None else slo.ttft_s
    tpot_s = config.tpot_target_s if slo.tpot_s is None else slo.tpot_s
    good = sum(r.ttft_s <= ttft_s and r.tpot_s <= tpot_s for r in records)
    return _figures(records, scheduler, good)


def _figures(records: Sequence[RequestStats], scheduler: Scheduler, good: int) -> WorkloadFigures:
    ttft = sorted(r.ttft_s for r in records)
    e2e = sorted(r.e2e_s for r in records)
    return WorkloadFigures(
        goodput=good / len(records),
        ttft_mean_ms=statistics.fmean(ttft) * 1e3,
        ttft_p50_ms=statistics.median(ttft) * 1e3,
        ttft_p99_ms=percentile(ttft, 0.99) * 1e3,
        e2e_mean_ms=statistics.fmean(e2e) * 1e3,
        e2e_p99_ms=percentile(e2e, 0.99) * 1e3,
        itl_max_ms=max(r.gap_max_s for r in records) * 1e3,
        makespan_s=max(r.last_s for r in records),
        computed_over_needed=scheduler.growth.over_needed,
        loads=scheduler.adapter_cache.loads,
        parks=scheduler.timelines.counts[Event.PARKED],
    )


def _divide(workload: Workload, policy: str, recorded: Sequence[Recorded]) -> tuple[Division, int]:
    """How memory is divided, and the length of the longest sequence served with it."""
    sizes = [_aligned(rank) for rank in workload.ranks]
    pages, arena = _pages(workload), workload.adapter_memory or 0
    for_pages = pages
    if workload.shared:
        # A sequence always leaves a place for the largest adapter.
        for_pages -= -(-max(sizes) // PAGE_BYTES)
    elif workload.places is not None:
        arena = workload.places * max(sizes)
    longest = _longest(workload, recorded, for_pages * _PAGE_TOKENS)
    context_pages = -(-longest // _PAGE_TOKENS)
    if policy == "resident":
        return Division(pages, PAGE_BYTES, context_pages, sum(sizes), shared=False), longest
    if workload.shared:
        arena = (pages - context_pages) * PAGE_BYTES
    elif max(sizes) > arena:
        raise ConfigError(
            f"adapter_memory: {arena} bytes hold no adapter of rank {max(workload.ranks)}, which "
            f"takes {max(sizes)}",
            field="adapter_memory",
        )
    return Division(pages, PAGE_BYTES, context_pages, arena, workload.shared), longest


def _aligned(rank: int) -> int:
    """Bytes of an image in the arena."""
    return -(-image_bytes(rank) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _pages(workload: Workload) -> int:
    if workload.kv_pages is not None:
        return workload.kv_pages
    if workload.memory is not None:
        return workload.memory // PAGE_BYTES - 1
    assert isinstance(workload.card, Card)
    return workload.card.shared_pages - 1


def _longest(workload: Workload, recorded: Sequence[Recorded], room: int) -> int:
    """room: tokens that the pages hold. Recorded requests are cut to it; drawn ones must fit."""
    if room < _PAGE_TOKENS:
        raise ConfigError(
            f"memory: {workload.memory} bytes do not hold an adapter of rank "
            f"{max(workload.ranks)} and a page",
            field="memory",
        )
    if recorded:
        return min(max(r.prompt_tokens + r.output_tokens for r in recorded), room, _CONTEXT)
    longest = workload.prompt_tokens[1] + workload.output_tokens[1]
    name = "memory, beside one adapter" if workload.shared else "kv_pages"
    if longest > min(room, _CONTEXT):
        raise ConfigError(
            f"prompt_tokens: {workload.prompt_tokens[1]} and output_tokens "
            f"{workload.output_tokens[1]} are {longest} tokens; there is room for "
            f"{min(room, _CONTEXT)} ({name})",
            field="prompt_tokens",
        )
    return longest


def _config(workload: Workload, policy: str) -> EngineConfig:
    host = workload.host_memory
    count = len(workload.ranks)
    places = workload.places if policy != "resident" else None
    return EngineConfig(
        "simulated",
        **{
            "device": "cuda",
            "plan_depth": 2,
            "host_memory": sum(map(_aligned, workload.ranks)) if host is None else host,
            "host_kv_memory": _HOST_KV_BYTES,
            "queue_max": 1_000_000,
            "directory_slots": count + 1,
            "slots_max": count if places is None else min(places, count),
            **workload.engine,
            **POLICIES[policy],
        },
    )


def _scheduler(
    workload: Workload, config: EngineConfig, division: Division, context: int
) -> Scheduler:
    costs = Costs(
        workload.card.copy_bytes_per_s,
        decode_s=workload.card.step_s((), {}),
        prefill_token_s=workload.card.prompt_s(1),
    )
    scheduler = assemble(
        config,
        context=context,
        eos_tokens=frozenset(),
        memory=division,
        alignment=_ALIGNMENT_BYTES,
        costs=costs,
    )
    adapter_cache = scheduler.adapter_cache
    for index, rank in enumerate(workload.ranks):
        size = image_bytes(rank)
        adapter_cache.register(adapter_name(index), "", size, pinned=False, now_s=0.0)
        if (
            adapter_cache.host.used + adapter_cache.extents.aligned(size)
            <= adapter_cache.host.capacity
        ):
            adapter_cache.begin_on_host(adapter_name(index))
    return scheduler
