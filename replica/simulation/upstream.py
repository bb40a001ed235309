"""Replays the published tables: upstream before a change, upstream after it, and ours.

Three pull requests of SGLang (14795, 17913, 15512) published figures of a server before and after a
change of its adapter scheduling (`published.py`). The workloads here are theirs. What the tables do
not state is chosen here: the adapters' ranks, the places of 14795 (its default of eight slots), and
how long 17913 waits before it drains (3 s, as in its tests). Places and ranks are the same for all
three policies.

Upstream's server, as simulated: each step scans the queue; the least recently used adapter leaves
first; a load stops the batch (except 15512 after); one load runs at a time; a step of up to 8,192
prompt tokens is computed alone, and decodes wait while prompts can be computed.

    14795 before  the base model takes a slot while in use, and the scan stops at the first miss
          after   the base model has its own place, and the scan goes on
    17913 before  as 14795 after
          after   and an adapter in use is drained for one that starved 3 s
    15512 before  as 14795 after
          after   and loads overlap with the batch

A fourth run (`SHARED`) has no limit of places: ours on the whole card, where adapters and KV pages
share the memory that the weights leave.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.costs import Costs
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.host_tier import HostTier
from replica.scheduling.loads import Switches
from replica.scheduling.pages import Pages
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from replica.scheduling.victims import ORDERS
from replica.simulation.cards import A100, DISK_BYTES_PER_S, H200, PAGE_BYTES, Card, image_bytes
from replica.simulation.simulator import Figures, Simulator, figures, median_figures
from replica.simulation.workloads import Stream, arrivals

POLICIES = ("before", "after", "ours")
SHARED = "shared"  # ours, with one memory for adapters and KV pages instead of places
CHUNK_TOKENS = 8192
BATCH_ROWS_MAX = 256
CONTEXT = 131_072
DIRECTORY_SLOTS = 255


@dataclass(frozen=True, slots=True)
class Policy:
    """One server: how it schedules and evicts.

    upstream: it loads at the rate of the measured servers, one adapter at a time.
    mixed: it computes prompts and decodes in one batch.
    """

    switches: Switches
    sharing: Sharing
    eviction: str
    upstream: bool
    mixed: bool = True


OURS = Policy(Switches(), Sharing(), "cost", upstream=False)


@dataclass(frozen=True, slots=True)
class Table:
    """One row of the published figures.

    places: adapters that fit at once. If `packed`, ours gets the bytes of that many adapters of the
        largest rank instead.
    """

    name: str
    title: str
    card: Card
    streams: tuple[Stream, ...]
    ranks: Mapping[str, int]
    places: int
    before: Policy
    after: Policy
    packed: bool = False
    ours: Policy = OURS

    def policy(self, name: str) -> Policy:
        return {"before": self.before, "after": self.after}.get(name, self.ours)

    def all_base(self) -> "Table":
        """The same requests, all for the base model."""
        streams = tuple(dataclasses.replace(s, adapters=()) for s in self.streams)
        return dataclasses.replace(self, streams=streams)


_NO_SHARING = Sharing(park=False)
_SKIP = Policy(Switches(overlap=False, prefetch_depth=0), _NO_SHARING, "lru", True, mixed=False)
_BLOCK = Policy(
    Switches(base_slot="shared", on_miss="block", overlap=False, prefetch_depth=0),
    _NO_SHARING,
    "lru",
    True,
    mixed=False,
)
_DRAIN = Policy(
    Switches(overlap=False, prefetch_depth=0),
    Sharing(park=False, drain_wait_threshold_s=3.0),
    "lru",
    True,
    mixed=False,
)
_OVERLAP = Policy(Switches(prefetch_depth=0), _NO_SHARING, "lru", True, mixed=False)


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
            "H200, 16 adapters of rank 16 on 7 places beside the base model, 2 + 2 requests/s",
            H200,
            (_BASE, Stream("lora", 100, 2.0, 2048, 1024, _names(16))),
            _cycled(16, 16),
            7,  # of eight slots; the base model has one
            _BLOCK,
            _SKIP,
        ),
        Table(
            "17913",
            "A100, 6 adapters of rank 64 on 3 places, 4 requests/s",
            A100,
            (_SIX,),
            _cycled(6, 64),
            3,
            _SKIP,
            _DRAIN,
        ),
        Table(
            "17913-packed",
            "A100, 6 adapters of ranks 4 to 64 in the bytes of 3 of rank 64, 4 requests/s",
            A100,
            (_SIX,),
            _ranks(4, 8, 16, 16, 32, 64),
            3,
            _SKIP,
            _DRAIN,
            packed=True,
        ),
        Table(
            "15512-large",
            "H200, 16 adapters of rank 256 (1.34 GB) on 8 places, 4 requests/s",
            H200,
            (_SIXTEEN,),
            _cycled(16, 256),
            8,
            _SKIP,
            _OVERLAP,
        ),
        Table(
            "15512-small",
            "H200, 16 adapters of ranks 8 to 64 (42 to 336 MB) on 8 places, 4 requests/s",
            H200,
            (_SIXTEEN,),
            _cycled(16, 8, 16, 32, 64),
            8,
            _SKIP,
            _OVERLAP,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Replay:
    """figures: by stream, one for each seed."""

    figures: Mapping[str, Sequence[Figures]]

    def median(self, stream: str) -> Figures:
        """The median of each figure over the seeds."""
        return median_figures(self.figures[stream])


def replay(
    table: Table, policy: str, seeds: Iterable[int], depth: int = 2, cold: bool = False
) -> Replay:
    """depth, cold: as for `simulator`."""
    runs = [
        simulator(table, policy, depth=depth, cold=cold).run(arrivals(table.streams, seed))
        for seed in seeds
    ]
    return Replay(
        {
            stream.name: [
                figures([r for r in run if r.arrival.stream == stream.name]) for run in runs
            ]
            for stream in table.streams
        }
    )


def simulator(
    table: Table, policy: str, check: bool = False, depth: int = 2, cold: bool = False
) -> Simulator:
    """A server of this table and policy, before its first request.

    depth: of ours; 2 is how the engine runs on CUDA. Upstream's servers run at 1.
    cold: adapters start as files, and stay in host memory once they were read.
    """
    chosen = table.policy(policy)
    card = table.card.as_upstream() if chosen.upstream else table.card
    if cold:
        card = card.with_files(DISK_BYTES_PER_S)
    ranks: dict[str | None, int] = {None: 0} | dict(table.ranks.items())
    host = HostTier(sum(map(image_bytes, table.ranks.values())) + 2**20 if cold else 0)
    scheduler = _scheduler(table, chosen, card, host, shared=policy == SHARED)
    depth = 1 if chosen.upstream else depth
    return Simulator(scheduler, card, ranks, check=check, mixed=chosen.mixed, depth=depth)


def _scheduler(table: Table, policy: Policy, card: Card, host: HostTier, shared: bool) -> Scheduler:
    costs = Costs(card.copy_bytes_per_s, decode_s=0.01, prefill_token_s=5e-5)
    packed = table.packed and not policy.upstream
    ranks = table.places * max(table.ranks.values())
    slots = len(table.ranks) if packed else table.places
    if not policy.switches.base_pinned:
        slots += 1  # the base model takes one while in use
    pages, extents = Pages(card.pages, 16, cache=False), Extents(image_bytes(ranks) + 2**20)
    budget = None
    if shared:
        slots = DIRECTORY_SLOTS
        pages, extents = Pages(card.shared_pages, 16, cache=False), Extents(0)
        headroom = BATCH_ROWS_MAX + pages.needed(CHUNK_TOKENS)
        budget = Budget(extents, pages, PAGE_BYTES, pages.needed(CONTEXT), headroom)
    adapter_cache = AdapterCache(
        extents, slots, ORDERS[policy.eviction], costs.copy_s, 1.0, 60.0, host, budget
    )
    for adapter, rank in table.ranks.items():
        adapter_cache.register(adapter, "", image_bytes(rank), pinned=False, now_s=0.0)
    limits = Limits(
        batch_rows_max=BATCH_ROWS_MAX,
        step_tokens_max=CHUNK_TOKENS,
        queue_max=100_000,
        loads_in_flight_max=1 if policy.upstream else 8,
        context=CONTEXT,
    )
    return Scheduler(limits, pages, adapter_cache, costs, policy.switches, policy.sharing)
