"""Which adapters to bring next, and what must stay for those that are needed sooner."""

from cluster.values import Tier
from replica.residency import Residency
from replica.waiting import Key, Waiting


def service_order(waiting: Waiting, residency: Residency) -> list[str]:
    """Adapters that are waited for and not on the device: by priority, then who starved longest.

    A parked adapter starves from when it was parked, so that all of them take turns.
    """
    starving: list[tuple[int, float, Key, str]] = []
    for digest in waiting.places():
        adapter = residency.adapters[digest]
        if adapter.tier in (Tier.DISK, Tier.HOST, Tier.FAILED):
            assert adapter.starved_s is not None
            head = waiting.key(waiting.head(digest))
            starving.append((head[0], adapter.starved_s, head, digest))
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
