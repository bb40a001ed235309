"""The order in which absent adapters are loaded."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from cluster.values import Tier
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.waiting import Key, Waiting

# With fewer tokens left than this, a parked adapter yields less to those that have none yet.
_FEW_TOKENS = 192

_Rank = tuple[int, float, Key, str]


class ServiceOrder:
    """Absent adapters that requests wait for: by priority, then by who starved longest.

    A parked adapter starves from the moment it was parked, so that all take turns. An adapter with
    a request that has no token yet goes before a parked one that starved up to `head_start_s`
    longer; this lead shrinks with the tokens that the parked one has left. The order does not
    depend on the time, so only adapters that changed are sorted in again.
    """

    def __init__(self, waiting: Waiting, adapter_cache: AdapterCache, head_start_s: float) -> None:
        self._waiting = waiting
        self._adapter_cache = adapter_cache
        self._head_start_s = head_start_s
        self._ranks: dict[str, _Rank] = {}
        self._ordered: list[_Rank] = []

    def digests(self) -> Iterator[str]:
        self._update()
        return (rank[-1] for rank in self._ordered)

    def _update(self) -> None:
        touched = self._waiting.touched | self._adapter_cache.touched
        self._waiting.touched.clear()
        self._adapter_cache.touched.clear()
        for digest in sorted(touched):
            old, new = self._ranks.pop(digest, None), self._rank(digest)
            if old is not None:
                del self._ordered[bisect_left(self._ordered, old)]
            if new is not None:
                insort(self._ordered, new)
                self._ranks[digest] = new

    def check(self) -> None:
        self._update()
        ranks = filter(None, map(self._rank, self._waiting.adapter_keys()))
        assert sorted(ranks) == self._ordered, "the order missed a change"

    def _rank(self, digest: str) -> _Rank | None:
        adapter = self._adapter_cache.adapters.get(digest)
        if adapter is None or adapter.tier in (Tier.DEVICE, Tier.LOADING):
            return None
        if not self._waiting.waited_for(digest):
            return None
        assert adapter.starved_s is not None
        key = self._waiting.key(self._waiting.head(digest))
        return key[0], adapter.starved_s + self._handicap_s(digest), key, digest

    def _handicap_s(self, digest: str) -> float:
        if not self._waiting.all_begun(digest):
            return 0.0
        left = max(request.remaining for request in self._waiting.group(digest))
        return self._head_start_s * min(1.0, left / _FEW_TOKENS)
