"""How long prompts wait for loads in flight, so that one step prefills the whole group."""

from collections.abc import Mapping, Sequence

from cluster.costs import Costs
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.request import Request
from replica.scheduling.waiting import Waiting

# How much longer to wait for a late copy, as a share of a prefill.
_LATE = 0.1


def hold_until(
    expected: Mapping[str, float],
    adapter_cache: AdapterCache,
    waiting: Waiting,
    costs: Costs,
    step_tokens_max: int,
    now_s: float,
) -> float | None:
    """Until when prompts of newly loaded adapters wait for loads in flight; None: they do not wait.

    expected: digest → when its load in flight is expected to end; none without overlap.

    Prefilling a group costs little more than prefilling its first member. The choices are to wait
    for none, one, … or all of the loads in flight; the one with the least sum of waits is taken. No
    prompt waits for longer than one prefill.
    """
    if not expected:
        return None
    fresh = [a for a in adapter_cache.fresh.values() if a.wanted]
    here = [r.tokens - r.computed for a in fresh for r in waiting.group(a.digest)]
    if not here:
        return None
    prefill_s = costs.prefill_s(min(max(here), step_tokens_max))
    if now_s - min(a.since_s for a in fresh) >= prefill_s:
        return None
    late_s = prefill_s * _LATE
    adjusted = ((end if end > now_s else end + late_s, digest) for digest, end in expected.items())
    coming = sorted((end, digest) for end, digest in adjusted if end > now_s)
    ends = [end for end, _ in coming]
    counts = [len(here), *(len(waiting.group(digest)) for _, digest in coming)]
    choices = [
        (_ends_sum_s(start_s, awaited, counts, ends, prefill_s), start_s)
        for awaited, start_s in enumerate([now_s, *ends])
    ]
    start_s = min(choices)[1]
    return None if start_s == now_s else start_s


def is_held(request: Request, adapter_cache: AdapterCache) -> bool:
    """True if `hold_until` applies to it."""
    return request.adapter_key is not None and adapter_cache.adapters[request.adapter_key].fresh


def _ends_sum_s(
    start_s: float, awaited: int, counts: Sequence[int], ends: Sequence[float], prefill_s: float
) -> float:
    """Sum of the times at which the prefills end, if the first one waits for `awaited` loads.

    counts: requests that are here, then those that arrive at each of `ends`. Each further prefill
        takes all that arrived before it.
    """
    now_s, total_s = start_s, 0.0
    taken, here = 0, awaited + 1
    while taken < len(counts):
        while here < len(counts) and ends[here - 1] <= now_s:
            here += 1
        if here == taken:
            now_s, here = ends[taken - 1], taken + 1
        now_s += prefill_s
        total_s += sum(counts[taken:here]) * now_s
        taken = here
    return total_s
