"""A small scheduler for tests, and functions that drive it. The time is passed in.

Adapters a, b, c and d have 40 bytes each; the arena's 100 bytes hold two of them. Copying one
takes 10 ms, a decode step 50 ms.
"""

from collections.abc import Callable, Mapping

from cluster.costs import Costs
from replica.scheduling import victims
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.growth import Growth
from replica.scheduling.loads import Switches
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Plan
from replica.scheduling.request import Delta, NewRequest, Sampled, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.share import Share
from replica.scheduling.turns import Sharing

EOS = 2
STEP_S = 0.05
SIZES = dict.fromkeys("abcd", 40)


def scheduler(
    *,
    rows: int = 8,
    tokens: int = 64,
    queue: int = 100,
    pages: int = 64,
    arena: int = 100,
    slots: int = 8,
    loads: int = 2,
    context: int = 128,
    sizes: Mapping[str, int] = SIZES,
    pinned: str = "",
    copy_bytes_per_s: float = 4000.0,
    switches: Switches | None = None,
    sharing: Sharing | None = None,
    share: Share | None = None,
    order: victims.EvictionOrder = victims.lru,
    parked_pages_max: int | None = None,
    page_wait_max_s: float = 2.0,
    page_bytes: int | None = None,
    headroom: int = 0,
    growth_outputs: float = 0.0,
    host_pages: int = 0,
    host_cache: bool = False,
    page_copy_s: float = 0.001,
) -> Scheduler:
    """page_bytes: adapters share the memory of the `pages`, instead of having an `arena`.

    growth_outputs: 0 admits rows to the batch regardless of the pages that they will grow to.
    host_pages: 0 loses the pages of rows for which the device has none.
    host_cache: requests that end leave their prefixes there.
    page_copy_s: of one page, as `Costs` has it.
    """
    limits = Limits(
        rows, tokens, queue, loads, context, frozenset({EOS}), parked_pages_max, page_wait_max_s
    )
    costs = Costs(copy_bytes_per_s=copy_bytes_per_s, decode_s=STEP_S, prefill_token_s=1e-3)
    kv, extents = Pages(pages, 16), Extents(arena if page_bytes is None else 0, 1)
    budget = None
    if page_bytes is not None:
        budget = Budget(extents, kv, page_bytes, kv.needed(context), headroom)
    adapter_cache = AdapterCache(extents, slots, order, costs.copy_s, 1.0, 8.0, budget=budget)
    for digest, size in sizes.items():
        adapter_cache.register(digest, f"/{digest}", size, pinned=digest in pinned, now_s=0.0)
    growth = Growth(16, pages * 16, growth_outputs)
    host = Pages(host_pages, 16, host_cache) if host_pages else None
    costs.pages_copied(1, page_copy_s)
    copies = PageCopies(kv, host, 1, costs)
    return Scheduler(limits, kv, adapter_cache, costs, switches, sharing, share, growth, copies)


def new(
    name: str, digest: str | None = None, prompt: int = 4, priority: int = 0, **sampling: object
) -> NewRequest:
    fields: dict[str, object] = {"max_tokens": 4, **sampling}
    first = 1000 * sum(map(ord, name))  # so that prompts share no prefix
    tokens = tuple(range(first, first + prompt))
    return NewRequest(name, tokens, Sampling(**fields), digest, priority)  # type: ignore[arg-type]


def run(
    core: Scheduler, now_s: float = 0.0, token: Callable[[str], int] = lambda _: 7
) -> tuple[Plan, list[Delta]]:
    """Runs one step and checks every invariant."""
    plan = core.step(now_s)
    core.check()
    chosen = [Sampled(token(w.request.id)) if w.sample else None for w in plan.rows]
    deltas = core.commit(plan, chosen, now_s)
    core.check()
    return plan, [*plan.failed, *deltas]


def settle(core: Scheduler, now_s: float) -> tuple[Plan, list[Delta]]:
    """Runs one step and completes the loads and the page copies that it starts."""
    plan, deltas = run(core, now_s)
    for copy in plan.page_copies:
        core.pages_copied(copy.number, now_s)
    for change in plan.arena_changes:
        if core.switches.overlap and change.load is not None:
            core.loaded(change.load.digest, now_s)
    core.check()
    return plan, deltas


def begin(core: Scheduler, *requests: NewRequest, now_s: float = 0.0) -> None:
    """Adds requests and steps until all of them run."""
    for request in requests:
        core.add(request, now_s)
    for _ in range(10):
        if all(request.id in core.running_set.running for request in requests):
            return
        settle(core, now_s)
    raise AssertionError("the requests do not run")


def ran(plan: Plan) -> list[str]:
    return [work.request.id for work in plan.rows]


def loaded(plan: Plan) -> list[str]:
    return [change.load.digest for change in plan.arena_changes if change.load is not None]


def evicted(plan: Plan) -> list[str]:
    return [evict.digest for change in plan.arena_changes for evict in change.evictions]
