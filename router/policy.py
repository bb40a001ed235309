"""The routing policy: ranks replicas by expected wait, the sum of queue and load times."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from cluster.values import Tier


@dataclass(frozen=True, slots=True)
class Candidate:
    """A router's estimate of one replica, including its own picks not yet in a report.

    known: the replica has reported. If not, it is starting, or dead and not yet removed.
    tier: the requested adapter's on the replica; DEVICE for the base model.
    step_s, image_bytes, copy_bytes_per_s: 0 if unknown.
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
    """Defaults for what no replica has measured, and the engine's batch settings.

    slowdown_steps: steps for which the other requests in the batch slow a request down; a full
    batch is assumed to double a step. margin_s, margin_steps (steps of the slowest replica): the
    wait that a replica without the adapter must save to be worth another copy of the adapter. The
    margin also covers picks that have ended but still count. retry_s: the cost of a replica on
    which the adapter's load has failed.
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


def rank(candidates: Sequence[Candidate], key: str, weights: RoutingWeights) -> list[Candidate]:
    """Best first. A rendezvous hash of `key` breaks ties, so routers agree without coordination."""

    slowest_s = max((c.step_s for c in candidates), default=0.0)

    def order(candidate: Candidate) -> tuple[bool, float, int]:
        wait_s = queue_s(candidate, weights) + load_s(candidate, weights)
        if candidate.tier in (Tier.HOST, Tier.DISK, Tier.ABSENT):
            wait_s += weights.margin_s + weights.margin_steps * slowest_s
        return (not candidate.known, wait_s, -rendezvous(key, candidate.replica_id))

    return sorted(candidates, key=order)


def queue_s(candidate: Candidate, weights: RoutingWeights) -> float:
    """Prefill of the tokens queued ahead, plus the slowdown of decode by the batch's requests."""
    step_s = candidate.step_s or weights.step_s
    prefill_steps = candidate.queued_tokens / weights.step_tokens
    decode_steps = weights.slowdown_steps * candidate.requests / weights.batch_rows
    return step_s * (prefill_steps + decode_steps)


def load_s(candidate: Candidate, weights: RoutingWeights) -> float:
    """Time until the adapter is on the device. An eviction doubles it: its victim's later reload
    counts here.
    """
    image_bytes = candidate.image_bytes or weights.image_bytes
    copy_s = image_bytes / (candidate.copy_bytes_per_s or weights.copy_bytes_per_s)
    match candidate.tier:
        case Tier.DEVICE:
            return 0.0
        case Tier.LOADING:
            return copy_s / 2
        case Tier.FAILED:
            return weights.retry_s
        case Tier.HOST | Tier.DISK | Tier.ABSENT:
            evicts = candidate.free_bytes < image_bytes
            return copy_s * (2 if evicts else 1)


def rendezvous(key: str, replica_id: str) -> int:
    """Highest-random-weight hashing (Thaler, Ravishankar 1998)."""
    digest = blake2b(f"{key}\0{replica_id}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest)
