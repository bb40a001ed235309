"""A router's view of each replica: its last report, and own picks not yet in that report."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.values import AdapterState, LoadReport, Tier
from router.policy import Candidate

# An idle engine reports once a second, a busy one with each step.
_QUIET_S = 1.5


class ReplicaState(Protocol):
    """A replica's last report and residency. seen_s: when it arrived, on the reader's clock."""

    @property
    def report(self) -> LoadReport: ...

    @property
    def residency(self) -> Mapping[str, AdapterState]: ...

    @property
    def seen_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Pick:
    """A request that this router sent to a replica. digest: None for the base model."""

    digest: str | None
    tokens: int
    at_s: float


class View:
    """Combines replica states with this router's recent picks. Keeps only the picks.

    A pick counts until a report arrives that must include the request: one that arrives later
    than `transit_s` after the pick. Its tokens count until the engine's part of the report, which
    may be older, includes it. Without reports, a pick expires after `pick_life_s`, since the
    router does not learn of requests that were cancelled on the way.

    queue_max: the engine's; a replica with so many waiting requests is full. routers: those that
    pick for the fleet. HAProxy asks them in turn, so each sees its share of the picks.
    """

    def __init__(
        self, transit_s: float = 0.05, pick_life_s: float = 2.0, queue_max: float = float("inf")
    ) -> None:
        assert 0 <= transit_s < pick_life_s
        self.transit_s = transit_s
        self.pick_life_s = pick_life_s
        self.queue_max = queue_max
        self.routers = 1
        self._picks: dict[str, deque[Pick]] = {}

    def picked(self, replica_id: str, digest: str | None, tokens: int, now_s: float) -> None:
        self._picks.setdefault(replica_id, deque()).append(Pick(digest, tokens, now_s))

    def candidates(
        self,
        replica_ids: Iterable[str],
        states: Mapping[str, ReplicaState],
        digest: str | None,
        now_s: float,
    ) -> list[Candidate]:
        """One candidate a replica, in the given order. `states` may lack some replicas."""
        ids = list(replica_ids)
        known = {replica_id: states.get(replica_id) for replica_id in ids}
        self._sweep(known, now_s)
        image_bytes = _image_bytes(digest, known)
        return [self._candidate(i, known[i], digest, image_bytes, now_s) for i in ids]

    def _candidate(
        self,
        replica_id: str,
        state: ReplicaState | None,
        digest: str | None,
        image_bytes: int,
        now_s: float,
    ) -> Candidate:
        picks = self._picks.get(replica_id, ())
        report, silent_s, shown_s = LoadReport(), 0.0, -float("inf")
        if state is not None:
            report, shown_s = state.report, state.seen_s - self.transit_s
            silent_s = now_s - state.seen_s + report.age_s
        arriving = self.routers * sum(pick.at_s >= shown_s for pick in picks)
        tier = Tier.DEVICE  # the base model is on every device
        if digest is not None:
            held = state.residency.get(digest) if state is not None else None
            tier = held.tier if held is not None else Tier.ABSENT
            picked = any(pick.digest == digest for pick in picks)
            if picked and tier in (Tier.HOST, Tier.DISK, Tier.ABSENT):
                tier = Tier.LOADING
        return Candidate(
            replica_id=replica_id,
            known=state is not None,
            stalled=bool(report.stalled),
            full=report.waiting + arriving >= self.queue_max,
            silent_s=silent_s if silent_s > _QUIET_S else 0.0,
            requests=max(report.running + report.waiting, report.streams) + arriving,
            queued_tokens=report.queued_tokens + self.routers * sum(pick.tokens for pick in picks),
            step_s=report.step_s,
            tier=tier,
            image_bytes=image_bytes,
            copy_bytes_per_s=report.copy_bytes_per_s,
            host_bytes_per_s=report.host_bytes_per_s,
            free_bytes=report.free_bytes,
        )

    def _sweep(self, states: Mapping[str, ReplicaState | None], now_s: float) -> None:
        """Drops picks that a report includes, that have expired, or whose replica is gone."""
        for replica_id in [i for i in self._picks if i not in states]:
            del self._picks[replica_id]
        for replica_id, picks in self._picks.items():
            state = states[replica_id]
            shown_s = -float("inf")
            if state is not None:
                shown_s = state.seen_s - state.report.age_s - self.transit_s
            while picks and (picks[0].at_s < shown_s or picks[0].at_s < now_s - self.pick_life_s):
                picks.popleft()


def _image_bytes(digest: str | None, states: Mapping[str, ReplicaState | None]) -> int:
    """The adapter's image size as any replica reports it; 0 if none does."""
    if digest is None:
        return 0
    held = [s.residency[digest].bytes for s in states.values() if s and digest in s.residency]
    return max(held, default=0)
