"""From the configuration to a scheduler: what the engine and its twin both start from."""

from cluster.config import EngineConfig
from cluster.costs import Costs
from replica.admission import Limits
from replica.budget import Budget
from replica.drainer import Sharing
from replica.eviction import ORDERS
from replica.extents import Extents
from replica.host_tier import HostTier
from replica.loads import Switches
from replica.pages import Pages
from replica.residency import Residency
from replica.scheduler import Scheduler
from replica.share import Share


def assemble(
    config: EngineConfig,
    *,
    context: int,
    eos_tokens: frozenset[int],
    page_count: int,
    arena_bytes: int,
    alignment: int,
    costs: Costs,
    page_bytes: int | None = None,
) -> Scheduler:
    """context: tokens of the longest prompt + output. arena_bytes: for adapter images.

    page_bytes: of one KV page, where adapters share the memory of the pages; arena_bytes is 0 then.
    """
    slots = config.directory_slots - 1
    pages = Pages(page_count, config.page_tokens, config.prefix_cache)
    extents = Extents(arena_bytes, alignment)
    step_tokens = max(config.step_tokens_max, config.batch_rows_max)
    budget = None
    if page_bytes is not None:
        headroom = config.headroom_pages
        if headroom is None:
            headroom = config.batch_rows_max + pages.needed(step_tokens)
        budget = Budget(extents, pages, page_bytes, pages.needed(context), headroom)
    residency = Residency(
        extents,
        min(config.slots_max or slots, slots),
        ORDERS[config.eviction],
        costs.copy_s,
        config.load_retry_s,
        config.load_retry_max_s,
        HostTier(config.host_memory),
        budget,
    )
    limits = Limits(
        batch_rows_max=config.batch_rows_max,
        step_tokens_max=step_tokens,
        queue_max=config.queue_max,
        loads_in_flight_max=config.loads_in_flight_max,
        context=context,
        eos_tokens=eos_tokens,
        parked_pages_max=config.parked_pages_max,
        page_wait_max_s=config.page_wait_max_s,
    )
    switches = Switches(
        base_pinned=config.base_slot == "pinned",
        skip=config.on_miss == "skip",
        overlap=config.overlap,
        prefetch_depth=config.prefetch_depth,
    )
    sharing = Sharing(
        park=config.park,
        quantum_s=config.quantum_s,
        head_start_s=config.head_start_s,
        drain_wait_threshold_s=config.drain_wait_threshold_s,
    )
    return Scheduler(
        limits,
        pages,
        residency,
        costs,
        switches,
        sharing,
        Share(on=config.fair_share),
    )
