"""One workload on the engine's own scheduler and a virtual clock: what each policy makes of it."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from cluster.config import EngineConfig
from cluster.costs import Costs
from cluster.errors import ConfigError
from replica.assembly import assemble
from replica.hardware import PAGE_BYTES, Card, image_bytes
from replica.memory import Division
from replica.scheduler import Scheduler
from replica.story import Event
from replica.traces import Recorded
from replica.twin import Record, Twin, percentile
from replica.workload_file import Workload, adapter_name, arrivals

_ALIGNMENT_BYTES = 256
_PAGE_TOKENS = 16
# Of the model that the cards are of.
_CONTEXT = 131_072
# What a policy changes in the engine's configuration. `resident`: every adapter has a place.
POLICIES: Mapping[str, Mapping[str, object]] = {
    "ours": {},
    "skip": {"park": False},
    "drain": {"park": False, "drain_wait_threshold_s": 3.0},
    "resident": {"park": False},
}


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count for goodput."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True)
class WorkloadFigures:
    """goodput: the share of requests that met both targets. computed_over_needed: 1 when no token
    was computed twice.
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
    """Each figure's median over the seeds. check: the invariants after each step."""
    found = [_run(workload, policy, recorded, slo, seed, check) for seed in range(workload.seeds)]
    return WorkloadFigures(
        **{
            f.name: statistics.median(getattr(each, f.name) for each in found)
            for f in fields(WorkloadFigures)
        }
    )


def table(found: Mapping[str, WorkloadFigures]) -> Iterator[str]:
    """A row a policy, as text."""
    names = [f.name for f in fields(WorkloadFigures)]
    yield f"{'policy':9}" + "".join(f"{name:>{max(len(name) + 2, 12)}}" for name in names)
    for policy, each in found.items():
        cells = ((name, getattr(each, name)) for name in names)
        yield f"{policy:9}" + "".join(
            f"{value:>{max(len(name) + 2, 12)},.{0 if value >= 100 else 2}f}"
            for name, value in cells
        )


def _run(
    workload: Workload,
    policy: str,
    recorded: Sequence[Recorded],
    slo: Slo,
    seed: int,
    check: bool,
) -> WorkloadFigures:
    division, context = _divide(workload, policy, recorded)
    scheduler = _scheduler(workload, policy, division, context)
    ranks: dict[str | None, int] = {None: 0}
    ranks |= {adapter_name(i): r for i, r in enumerate(workload.ranks)}
    coming = arrivals(workload, recorded, context, seed)
    twin = Twin(scheduler, workload.card, ranks, check=check, depth=2)
    records = twin.run(coming)
    return _figures(records, scheduler, slo)


def _figures(records: Sequence[Record], scheduler: Scheduler, slo: Slo) -> WorkloadFigures:
    ttft = sorted(r.ttft_s for r in records)
    e2e = sorted(r.e2e_s for r in records)
    good = sum(r.ttft_s <= slo.ttft_s and r.tpot_s <= slo.tpot_s for r in records)
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
        loads=scheduler.residency.loads,
        parks=scheduler.stories.counts[Event.PARKED],
    )


def _divide(workload: Workload, policy: str, recorded: Sequence[Recorded]) -> tuple[Division, int]:
    """How the memory is divided, and the longest sequence that is served with it."""
    sizes = [image_bytes(rank) for rank in workload.ranks]
    if workload.kv_pages is not None:
        pages = workload.kv_pages
        arena = workload.adapter_memory
        if arena is None:
            assert workload.places is not None
            arena = workload.places * (max(sizes) + _ALIGNMENT_BYTES)
        shared = False
    else:
        card, memory = workload.card, workload.memory
        if memory is None:
            assert isinstance(card, Card)
            memory = card.shared_pages * PAGE_BYTES
        pages, arena, shared = memory // PAGE_BYTES - 1, 0, policy != "resident"
    if policy == "resident":
        arena = sum(sizes) + _ALIGNMENT_BYTES * len(sizes)
    longest = min(_longest(workload, recorded), _CONTEXT, pages * _PAGE_TOKENS)
    context_pages = -(-longest // _PAGE_TOKENS)
    if shared:
        arena = (pages - context_pages) * PAGE_BYTES
    if max(sizes) + _ALIGNMENT_BYTES > arena:
        field = "memory" if shared else "adapter_memory"
        raise ConfigError(
            f"{field}: leaves {arena} bytes for adapters; one takes {max(sizes)}", field=field
        )
    return Division(pages, PAGE_BYTES, context_pages, arena, shared), longest


def _longest(workload: Workload, recorded: Sequence[Recorded]) -> int:
    if recorded:
        return max(r.prompt_tokens + r.output_tokens for r in recorded)
    return workload.prompt_tokens[1] + workload.output_tokens[1]


def _scheduler(workload: Workload, policy: str, division: Division, context: int) -> Scheduler:
    sizes = [image_bytes(rank) for rank in workload.ranks]
    host = workload.host_memory
    config = EngineConfig(
        "simulated",
        **{
            "host_memory": sum(sizes) + _ALIGNMENT_BYTES * len(sizes) if host is None else host,
            "queue_max": 1_000_000,
            "directory_slots": len(sizes) + 1,
            **workload.engine,
            **POLICIES[policy],
        },
    )
    if workload.places is not None and policy != "resident":
        config = dataclasses.replace(config, slots_max=min(workload.places, len(sizes)))
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
    residency = scheduler.residency
    for index, size in enumerate(sizes):
        residency.register(adapter_name(index), "", size, pinned=False, now_s=0.0)
        if residency.host.used + residency.extents.aligned(size) <= residency.host.capacity:
            residency.begin_on_host(adapter_name(index))
    return scheduler
