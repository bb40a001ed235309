"""Builds a scheduler from the configuration, for the engine and for the simulator."""

from dataclasses import dataclass

from cluster.config import EngineConfig
from cluster.costs import Costs
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.growth import Growth
from replica.scheduling.host_tier import HostTier
from replica.scheduling.loads import Switches
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.share import Share
from replica.scheduling.turns import Sharing
from replica.scheduling.victims import ORDERS


@dataclass(frozen=True, slots=True)
class Division:
    """How device memory is divided.

    pages: KV pages; excludes page 0, the scratch page that padding rows write to.
    context_pages: KV pages of the longest sequence.
    arena_bytes: the most that images may take.
    shared: images and KV pages share one memory; images take the lowest pages.
    host_pages: KV pages that host memory holds besides.
    """

    pages: int
    page_bytes: int
    context_pages: int
    arena_bytes: int
    shared: bool
    host_pages: int = 0


def assemble(
    config: EngineConfig,
    *,
    context: int,
    eos_tokens: frozenset[int],
    memory: Division,
    alignment: int,
    costs: Costs,
) -> Scheduler:
    """context: longest prompt + output, in tokens. alignment: of images, in bytes."""
    pages = Pages(memory.pages, config.page_tokens, config.prefix_cache)
    extents = Extents(0 if memory.shared else memory.arena_bytes, alignment)
    budget = _budget(config, memory, pages, extents) if memory.shared else None
    adapter_cache = AdapterCache(
        extents,
        config.slots_max or config.directory_slots - 1,
        ORDERS[config.eviction],
        costs.copy_s,
        config.load_retry_s,
        config.load_retry_max_s,
        HostTier(config.host_memory or 0),
        budget,
    )
    limits = Limits(
        batch_rows_max=config.batch_rows_max,
        step_tokens_max=config.step_tokens,
        queue_max=config.queue_max,
        loads_in_flight_max=config.loads_in_flight_max,
        context=context,
        eos_tokens=eos_tokens,
        parked_pages_max=config.parked_pages_max,
        page_wait_max_s=config.page_wait_max_s,
    )
    switches = Switches(
        base_slot=config.base_slot,
        on_miss=config.on_miss,
        overlap=config.overlap,
        prefetch_depth=config.prefetch_depth,
    )
    sharing = Sharing(
        park=config.park,
        quantum_s=config.quantum_s,
        ttft_target_s=config.ttft_target_s,
        tpot_target_s=config.tpot_target_s,
        drain_wait_threshold_s=config.drain_wait_threshold_s,
    )
    return Scheduler(
        limits,
        pages,
        adapter_cache,
        costs,
        switches,
        sharing,
        Share(on=config.fair_share),
        Growth(config.page_tokens, memory.pages * config.page_tokens, config.growth_outputs),
        PageCopies(pages, _host_pages(config, memory), memory.page_bytes, costs),
    )


def _host_pages(config: EngineConfig, memory: Division) -> Pages | None:
    """Without overlap a row may not wait for pages: its adapter's load may fail meanwhile."""
    if not (config.page_copies and memory.host_pages):
        return None
    cache = config.prefix_cache and config.overlap
    return Pages(memory.host_pages, config.page_tokens, cache)


def _budget(config: EngineConfig, memory: Division, pages: Pages, extents: Extents) -> Budget:
    headroom = config.headroom_pages
    if headroom is None:
        headroom = config.batch_rows_max + pages.needed(config.step_tokens)
    return Budget(extents, pages, memory.page_bytes, memory.context_pages, headroom)
