"""The published tables this project answers to, replayed: upstream before, upstream after, ours.

Three pull requests of SGLang (14795, 17913, 15512) gave figures of a server before and after a
change of its adapter scheduling. Each workload here is theirs; what a table does not state (adapter
ranks, places) is set as named below and is the same for all three policies.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields

from cluster.costs import Costs
from replica.drainer import Sharing
from replica.eviction import ORDERS
from replica.extents import Extents
from replica.hardware import A100, H200, Card, image_bytes
from replica.loads import Switches
from replica.pages import Pages
from replica.residency import Residency
from replica.scheduler import Limits, Scheduler
from replica.twin import Figures, Record, Twin, figures
from replica.workloads import Arrival, Stream, arrivals

POLICIES = ("before", "after", "ours")
SEEDS = 5


@dataclass(frozen=True, slots=True)
class Policy:
    """One server: how it schedules, which eviction it has, and whether it is upstream's.

    upstream: it loads at the measured servers' rate, one adapter at a time, and never computes
    prompts and decodes in one batch.
    """

    switches: Switches
    sharing: Sharing
    eviction: str
    upstream: bool


@dataclass(frozen=True, slots=True)
class Table:
    """One row of the published figures.

    places: adapters that fit by count; None: by bytes alone (`arena_ranks`, in ranks).
    """

    name: str
    card: Card
    streams: tuple[Stream, ...]
    ranks: Mapping[str, int]
    places: int | None
    before: Policy
    after: Policy
    arena_ranks: int | None = None

    def policy(self, name: str) -> Policy:
        return {"before": self.before, "after": self.after, "ours": OURS}[name]


_NO_SHARING = Sharing(park=False)
OURS = Policy(Switches(), Sharing(), "cost", upstream=False)
_SKIP = Policy(Switches(overlap=False, prefetch_depth=0), _NO_SHARING, "lru", True)
_BLOCK = Policy(
    Switches(base_pinned=False, skip=False, overlap=False, prefetch_depth=0),
    _NO_SHARING,
    "lru",
    True,
)
_DRAIN = Policy(
    Switches(overlap=False, prefetch_depth=0),
    Sharing(park=False, drain_wait_threshold_s=1.0),
    "lru",
    True,
)
_OVERLAP = Policy(Switches(prefetch_depth=0), _NO_SHARING, "lru", True)


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"a{i}" for i in range(count))


def _ranks(*ranks: int) -> dict[str, int]:
    return dict(zip(_names(len(ranks)), ranks, strict=True))


def _cycled(count: int, *ranks: int) -> dict[str, int]:
    return _ranks(*(ranks[i % len(ranks)] for i in range(count)))


_BASE = Stream("base", 100, 2.0, 2048, 1024)
_SIX = Stream("lora", 200, 4.0, 512, 512, _names(6))
_SIXTEEN = Stream("lora", 100, 4.0, 512, 512, _names(16), "distinct")

TABLES = {
    t.name: t
    for t in (
        Table(
            "14795",
            H200,
            (_BASE, Stream("lora", 100, 2.0, 2048, 1024, _names(16))),
            _cycled(16, 16),
            # Eight slots, of which the base model took one.
            7,
            _BLOCK,
            _SKIP,
        ),
        Table("17913", A100, (_SIX,), _cycled(6, 64), 3, _SKIP, _DRAIN),
        Table(
            "17913-packed",
            A100,
            (_SIX,),
            _ranks(4, 8, 16, 16, 32, 64),
            3,
            _SKIP,
            _DRAIN,
            arena_ranks=3 * 64,
        ),
        Table("15512-large", H200, (_SIXTEEN,), _cycled(16, 256), 8, _SKIP, _OVERLAP),
        Table("15512-small", H200, (_SIXTEEN,), _cycled(16, 8, 16, 32, 64), 8, _SKIP, _OVERLAP),
    )
}


def simulate(
    table: Table, policy: str, seed: int, streams: tuple[Stream, ...] | None = None
) -> list[Record]:
    """streams: others than the table's own."""
    chosen = table.policy(policy)
    card = table.card.as_upstream() if chosen.upstream else table.card
    ranks: dict[str | None, int] = {None: 0}
    ranks.update(table.ranks.items())
    scheduler = _scheduler(table, chosen, card, policy)
    twin = Twin(scheduler, card, ranks, mixed=not chosen.upstream)
    coming: list[Arrival] = arrivals(streams or table.streams, seed)
    return twin.run(coming)


def _scheduler(table: Table, policy: Policy, card: Card, name: str) -> Scheduler:
    costs = Costs(card.copy_bytes_per_s, decode_s=0.01, prefill_token_s=5e-5)
    packed = table.arena_ranks is not None and name == "ours"
    largest = max(table.ranks.values())
    places = table.places if table.places is not None else len(table.ranks)
    ranks = table.arena_ranks if packed and table.arena_ranks else places * largest
    slots = len(table.ranks) if packed else places
    if not policy.switches.base_pinned:
        slots += 1  # the base model has one of them while it is in use
    residency = Residency(
        Extents(image_bytes(ranks) + 2**20), slots, ORDERS[policy.eviction], costs.copy_s, 1.0, 60.0
    )
    for adapter, rank in table.ranks.items():
        residency.register(adapter, "", image_bytes(rank), pinned=False, now_s=0.0)
    limits = Limits(
        batch_rows_max=256,
        step_tokens_max=8192,
        queue_max=100_000,
        loads_in_flight_max=1 if policy.upstream else 8,
        context=131_072,
    )
    return Scheduler(
        limits,
        Pages(card.pages, 16, cache=False),
        residency,
        costs,
        policy.switches,
        policy.sharing,
    )


def median_figures(table: Table, policy: str, seeds: int = SEEDS) -> dict[str, Figures]:
    """Stream → the median of each figure over the seeds."""
    runs = [simulate(table, policy, seed) for seed in range(seeds)]
    return {stream.name: _median(runs, stream.name) for stream in table.streams}


def all_base(table: Table, seeds: int = SEEDS) -> Figures:
    """The figures of the base stream when every stream names the base model, under our policy."""
    streams = tuple(
        Stream(s.name, s.requests, s.rate, s.prompt_tokens_max, s.output_tokens_max)
        for s in table.streams
    )
    runs = [simulate(table, "ours", seed, streams) for seed in range(seeds)]
    return _median(runs, "base")


def _median(runs: list[list[Record]], stream: str) -> Figures:
    each = [figures([r for r in run if r.arrival.stream == stream]) for run in runs]
    return Figures(
        **{f.name: statistics.median(getattr(e, f.name) for e in each) for f in fields(Figures)}
    )
