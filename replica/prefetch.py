"""Which adapters to bring next, and what must stay for those that are needed sooner."""

from cluster.values import Tier
from replica.residency import Residency
from replica.waiting import Key, Waiting


def service_order(waiting: Waiting, residency: Residency, head_start_s: float) -> list[str]:
    """Adapters that are waited for and not on the device: by priority, then who starved longest.

    A parked adapter starves from when it was parked, so that all of them take turns; one with a
    request that has no token yet goes before those that starved up to `head_start_s` longer.
    """
    starving: list[tuple[int, float, Key, str]] = []
    for digest in waiting.places():
        adapter = residency.adapters[digest]
        if adapter.tier in (Tier.DISK, Tier.HOST, Tier.FAILED):
            assert adapter.starved_s is not None
            head = waiting.key(waiting.head(digest))
            begun = all(request.output for request in waiting.group(digest))
            since_s = adapter.starved_s + (head_start_s if begun else 0.0)
            starving.append((head[0], since_s, head, digest))
    return [digest for *_, digest in sorted(starving)]


def needed_sooner(digest: str, waiting: Waiting, residency: Residency) -> set[str]:
    """Idle adapters that an earlier request waits for (for batch space or pages)."""
    head = waiting.key(waiting.head(digest))
    return {
        a.digest
        for a in residency.adapters.values()
        if a.tier is Tier.DEVICE
        and a.users == 0
        and a.wanted
        and waiting.key(waiting.head(a.digest)) < head
    }


def ahead(residency: Residency) -> int:
    """Adapters on their way or placed that no row has used yet."""
    return residency.loading + sum(
        a.fresh and a.wanted for a in residency.adapters.values() if a.tier is Tier.DEVICE
    )
