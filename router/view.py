"""What a router believes of each replica: what it last said, and our picks it cannot show yet."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.values import AdapterState, LoadReport, Tier
from router.policy import Candidate


class Said(Protocol):
    """What a replica last said of itself; seen_s is on the reader's clock."""

    @property
    def report(self) -> LoadReport: ...

    @property
    def residency(self) -> Mapping[str, AdapterState]: ...

    @property
    def seen_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Pick:
    """One request that this router sent to a replica. digest: None for the base model."""

    digest: str | None
    tokens: int
    at_s: float


class View:
    """Beliefs are made anew for each choice; only our own picks are kept.

    A pick counts until a report is seen that was sent after the request can have arrived
    (`transit_s` after the pick). A replica that reports nothing has its picks forgotten after
    `pick_life_s`: nobody tells us of a request that was cancelled on the way.
    """

    def __init__(self, transit_s: float = 0.05, pick_life_s: float = 2.0) -> None:
        assert 0 <= transit_s < pick_life_s
        self.transit_s = transit_s
        self.pick_life_s = pick_life_s
        self._picks: dict[str, deque[Pick]] = {}

    def picked(self, replica_id: str, digest: str | None, tokens: int, now_s: float) -> None:
        self._picks.setdefault(replica_id, deque()).append(Pick(digest, tokens, now_s))

    def candidates(
        self,
        replica_ids: Iterable[str],
        states: Mapping[str, Said],
        digest: str | None,
        now_s: float,
    ) -> list[Candidate]:
        """One candidate a replica, in the order given. `states` may lack any of them."""
        ids = list(replica_ids)
        said = {replica_id: states.get(replica_id) for replica_id in ids}
        self._sweep(said, now_s)
        image_bytes = _image_bytes(digest, said)
        return [self._candidate(i, said[i], digest, image_bytes) for i in ids]

    def _candidate(
        self, replica_id: str, said: Said | None, digest: str | None, image_bytes: int
    ) -> Candidate:
        picks = self._picks.get(replica_id, ())
        report = said.report if said is not None else LoadReport()
        tier = Tier.DEVICE  # the base model is always there
        if digest is not None:
            held = said.residency.get(digest) if said is not None else None
            tier = held.tier if held is not None else Tier.ABSENT
            on_its_way = any(pick.digest == digest for pick in picks)
            if on_its_way and tier in (Tier.HOST, Tier.DISK, Tier.ABSENT):
                tier = Tier.LOADING
        return Candidate(
            replica_id=replica_id,
            known=said is not None,
            requests=report.running + report.waiting + len(picks),
            queued_tokens=report.queued_tokens + sum(pick.tokens for pick in picks),
            step_s=report.step_s,
            tier=tier,
            image_bytes=image_bytes,
            copy_bytes_per_s=report.copy_bytes_per_s,
            free_bytes=report.free_bytes,
        )

    def _sweep(self, said: Mapping[str, Said | None], now_s: float) -> None:
        """Forget picks that a report shows, that are too old, or whose replica is gone."""
        for replica_id in [i for i in self._picks if i not in said]:
            del self._picks[replica_id]
        for replica_id, picks in self._picks.items():
            state = said[replica_id]
            shown_s = state.seen_s - self.transit_s if state is not None else -float("inf")
            while picks and (picks[0].at_s < shown_s or picks[0].at_s < now_s - self.pick_life_s):
                picks.popleft()


def _image_bytes(digest: str | None, said: Mapping[str, Said | None]) -> int:
    """The size of the image by whoever holds it; 0 when nobody has told."""
    if digest is None:
        return 0
    held = [s.residency[digest].bytes for s in said.values() if s and digest in s.residency]
    return max(held, default=0)
