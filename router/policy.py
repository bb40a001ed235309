"""The routing policy: ranks replicas by expected wait, the sum of queue and load times."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from cluster.values import Tier


@dataclass(frozen=True, slots=True)
class Candidate:
    """A router's estimate of one replica, including its own picks not yet in a report.

    known: the replica has reported. If not, it is starting, or dead and not yet removed.
    stalled: its engine hangs or is started again. full: it would refuse a request.
    silent_s: time since its engine said anything, if that is longer than an idle engine's interval.
    tier: the requested adapter's on the replica; DEVICE for the base model.
    copy_bytes_per_s, host_bytes_per_s: of loads from disk and from host memory.
    step_s, image_bytes and these rates are 0 if unknown.
    """

    replica_id: str
    known: bool = True
    stalled: bool = False
    full: bool = False
    silent_s: float = 0.0
    requests: int = 0
    queued_tokens: int = 0
    step_s: float = 0.0
    tier: Tier = Tier.DEVICE
    image_bytes: int = 0
    copy_bytes_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RoutingWeights:
    """Defaults for what no replica has measured, and the engine's batch settings.

    slowdown_steps: steps for which the other requests in the batch slow a request down; a full
    batch is assumed to double a step. margin_s, margin_steps: the wait that a replica without the
    adapter must save to be worth another copy of the adapter. The steps are those of the replica
    that holds it, or of the other one if that is faster. The margin also covers picks that have
    ended but still count. retry_s: the cost of a replica on which the adapter's load has failed.
    slow_times: a replica is slow if its steps take this many times those of the fastest one, and of
    fast_s: shorter ones vary that much on a busy machine.
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
    slow_times: float = 5.0
    fast_s: float = 0.01


def rank(candidates: Sequence[Candidate], key: str, weights: RoutingWeights) -> list[Candidate]:
    """Best first. A rendezvous hash of `key` breaks ties, so routers agree without coordination.

    Those that would refuse a request or keep it waiting for an engine come last, in this order. A
    slow one gets what would wait longer than the margin elsewhere, so it is seen when it recovers.
    """
    wait_s = {c.replica_id: queue_s(c, weights) + load_s(c, weights) for c in candidates}
    fastest_s = min((c.step_s for c in candidates if _usable(c) and c.step_s), default=math.inf)
    slow_s = weights.slow_times * max(fastest_s, weights.fast_s)
    slow = {c.replica_id for c in candidates if c.step_s > slow_s}
    holders = [
        c
        for c in candidates
        if _usable(c) and c.tier in (Tier.DEVICE, Tier.LOADING) and c.replica_id not in slow
    ]
    holder = min(holders, key=lambda c: (wait_s[c.replica_id], c.replica_id), default=None)

    def order(candidate: Candidate) -> tuple[bool, bool, bool, float, int]:
        cost_s = wait_s[candidate.replica_id]
        if candidate.replica_id in slow:
            cost_s += weights.margin_s + weights.margin_steps * fastest_s
        if holder is not None and candidate.tier in (Tier.HOST, Tier.DISK, Tier.ABSENT):
            step_s = min(candidate.step_s or weights.step_s, holder.step_s or weights.step_s)
            cost_s += weights.margin_s + weights.margin_steps * step_s
        unusable = (not candidate.known, candidate.stalled, candidate.full)
        return (*unusable, cost_s, -rendezvous(key, candidate.replica_id))

    return sorted(candidates, key=order)


def _usable(candidate: Candidate) -> bool:
    return candidate.known and not candidate.stalled and not candidate.full


def queue_s(candidate: Candidate, weights: RoutingWeights) -> float:
    """Prefill of the tokens queued ahead, plus the slowdown of decode by the batch's requests.

    An engine that is silent may hang: it takes at least as long as it has been silent.
    """
    step_s = candidate.step_s or weights.step_s
    prefill_steps = candidate.queued_tokens / weights.step_tokens
    decode_steps = weights.slowdown_steps * candidate.requests / weights.batch_rows
    return step_s * (prefill_steps + decode_steps) + candidate.silent_s


def load_s(candidate: Candidate, weights: RoutingWeights) -> float:
    """Time until the adapter is on the device. An eviction doubles it: its victim's later reload
    counts here.
    """
    image_bytes = candidate.image_bytes or weights.image_bytes
    rate = candidate.host_bytes_per_s if candidate.tier is Tier.HOST else 0.0
    copy_s = image_bytes / (rate or candidate.copy_bytes_per_s or weights.copy_bytes_per_s)
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
