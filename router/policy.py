"""Which replica should get a request: the least expected wait, queues and loads in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from cluster.values import Tier


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a router believes of one replica, own unreflected picks included.

    known: the replica has reported; one that has not is starting, or dead and not yet removed.
    tier: where the wanted adapter is there (DEVICE for the base model). image_bytes: 0 = unknown.
    """

    replica_id: str
    known: bool = True
    requests: int = 0
    queued_tokens: int = 0
    step_s: float = 0.0
    tier: Tier = Tier.DEVICE
    image_bytes: int = 0
    copy_bytes_per_s: float = 0.0
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RoutingWeights:
    """What is assumed where nothing is measured, and how the engine is set.

    slowdown_steps: steps over which a request feels its neighbours in the batch; a full batch is
    taken to double a step. margin_s and margin_steps (of the slowest replica): what a replica
    without the adapter must save before it is worth a second copy; picks that ended are believed in
    for a moment longer, and a few of those must not count as load. retry_s: what sending to a
    replica where the load failed costs.
    """

    step_tokens: int = 512
    batch_rows: int = 64
    step_s: float = 0.02
    copy_bytes_per_s: float = 1e9
    image_bytes: int = 32 * 2**20
    slowdown_steps: int = 64
    margin_s: float = 0.05
    margin_steps: int = 32
    retry_s: float = 10.0


def rank(candidates: Sequence[Candidate], key: str, costs: RoutingWeights) -> list[Candidate]:
    """Best first. Ties go by rendezvous hash of `key`, so that routers agree without talking."""

    slowest_s = max((c.step_s for c in candidates), default=0.0)

    def order(candidate: Candidate) -> tuple[bool, float, int]:
        wait_s = queue_s(candidate, costs) + load_s(candidate, costs)
        if candidate.tier in (Tier.HOST, Tier.DISK, Tier.ABSENT):
            wait_s += costs.margin_s + costs.margin_steps * slowest_s
        return (not candidate.known, wait_s, -rendezvous(key, candidate.replica_id))

    return sorted(candidates, key=order)


def queue_s(candidate: Candidate, costs: RoutingWeights) -> float:
    """Prefill in front of the request, then the neighbours' share of its decode steps."""
    step_s = candidate.step_s or costs.step_s
    prefill_steps = candidate.queued_tokens / costs.step_tokens
    decode_steps = costs.slowdown_steps * candidate.requests / costs.batch_rows
    return step_s * (prefill_steps + decode_steps)


def load_s(candidate: Candidate, costs: RoutingWeights) -> float:
    """Until the adapter is on the device, with what must be copied back for it if it evicts."""
    image_bytes = candidate.image_bytes or costs.image_bytes
    copy_s = image_bytes / (candidate.copy_bytes_per_s or costs.copy_bytes_per_s)
    match candidate.tier:
        case Tier.DEVICE:
            return 0.0
        case Tier.LOADING:
            return copy_s / 2
        case Tier.FAILED:
            return costs.retry_s
        case Tier.HOST | Tier.DISK | Tier.ABSENT:
            evicts = candidate.free_bytes < image_bytes
            return copy_s * (2 if evicts else 1)


def rendezvous(key: str, replica_id: str) -> int:
    """Highest-random-weight hashing (Thaler, Ravishankar 1998)."""
    digest = blake2b(f"{key}\0{replica_id}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest)
