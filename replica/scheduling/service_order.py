"""Absent adapters that wait, in an order that is kept up to date."""

from bisect import bisect_left
from collections.abc import Sequence

from cluster.values import Tier
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.turns import Turns
from replica.scheduling.waiting import Key, Waiting

_Rank = tuple[int, float, Key, str]


class ServiceOrder:
    """Absent adapters that requests wait for: by priority, then by who starved longest.

    A parked adapter starves from the moment it was parked, so that all take turns. The order does
    not depend on the time, so only adapters that changed are sorted in again.
    """

    def __init__(self, waiting: Waiting, adapter_cache: AdapterCache, turns: Turns) -> None:
        self._waiting = waiting
        self._adapter_cache = adapter_cache
        self._turns = turns
        self._ranks: dict[str, _Rank] = {}
        self._ordered: list[_Rank] = []
        self._digests: list[str] = []  # of these, in the same order

    def digests(self) -> Sequence[str]:
        self._update()
        return self._digests

    def _update(self) -> None:
        touched = self._waiting.touched | self._adapter_cache.touched
        self._waiting.touched.clear()
        self._adapter_cache.touched.clear()
        for digest in sorted(touched):
            self._turns.forget(digest)
            old, new = self._ranks.pop(digest, None), self._rank(digest)
            if old is not None:
                index = bisect_left(self._ordered, old)
                del self._ordered[index], self._digests[index]
            if new is not None:
                index = bisect_left(self._ordered, new)
                self._ordered.insert(index, new)
                self._digests.insert(index, digest)
                self._ranks[digest] = new

    def check(self) -> None:
        self._update()
        ranks = filter(None, map(self._rank, self._waiting.adapter_keys()))
        assert sorted(ranks) == self._ordered, "the order missed a change"
        assert [rank[-1] for rank in self._ordered] == self._digests

    def _rank(self, digest: str) -> _Rank | None:
        adapter = self._adapter_cache.adapters.get(digest)
        if adapter is None or adapter.tier in (Tier.DEVICE, Tier.LOADING):
            return None
        if not self._waiting.waited_for(digest):
            return None
        assert adapter.starved_s is not None
        key = self._waiting.key(self._waiting.head(digest))
        return key[0], adapter.starved_s, key, digest
