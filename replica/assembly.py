"""From the configuration to a scheduler: what the engine and its twin both start from."""

from cluster.config import EngineConfig
from cluster.costs import Costs
from replica.admission import Limits
from replica.budget import Budget
from replica.drainer import Sharing
from replica.eviction import ORDERS
from replica.extents import Extents
from replica.growth import Growth
from replica.host_tier import HostTier
from replica.loads import Switches
from replica.memory import Division
from replica.pages import Pages
from replica.residency import Residency
from replica.scheduler import Scheduler
from replica.share import Share


def assemble(
    config: EngineConfig,
    *,
    context: int,
    eos_tokens: frozenset[int],
    memory: Division,
    alignment: int,
    costs: Costs,
) -> Scheduler:
    """context: tokens of the longest prompt + output. alignment: of images, in bytes."""
    slots = config.directory_slots - 1
    pages = Pages(memory.pages, config.page_tokens, config.prefix_cache)
    extents = Extents(0 if memory.shared else memory.arena_bytes, alignment)
    step_tokens = max(config.step_tokens_max, config.batch_rows_max)
    budget = None
    if memory.shared:
        headroom = config.headroom_pages
        if headroom is None:
            headroom = config.batch_rows_max + pages.needed(step_tokens)
        budget = Budget(extents, pages, memory.page_bytes, memory.context_pages, headroom)
    residency = Residency(
        extents,
        config.slots_max or slots,
        ORDERS[config.eviction],
        costs.copy_s,
        config.load_retry_s,
        config.load_retry_max_s,
        HostTier(config.host_memory or 0),
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
        Growth(config.page_tokens, memory.pages * config.page_tokens, config.growth_outputs),
    )
