"""Which adapters leave the device for an image or for KV pages, and in which order.

The choice is found by trying, and changes nothing.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.values import Tier
from replica.scheduling.adapter import Adapter
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents


class Candidate(NamedTuple):
    """An adapter that may leave the device. A tuple, for a search makes one of each that is idle.

    wanted: a request waits for it. placed_s: since when it is there. used_s: when a row last ran.
    value: expected uses a second × seconds to load it again ÷ bytes (greedy-dual, Cao and Irani
    1997, with a decayed frequency in place of its clock).
    """

    digest: str
    bytes: int
    placed_s: float
    used_s: float
    wanted: bool
    value: float


EvictionOrder = Callable[[Iterable[Candidate]], list[Candidate]]


def lru(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Least recently used first, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.used_s, c.digest))


def fifo(candidates: Iterable[Candidate]) -> list[Candidate]:
    """First in, first out, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.placed_s, c.digest))


def cost(candidates: Iterable[Candidate]) -> list[Candidate]:
    """What is cheapest to lose first, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.value, c.used_s, c.digest))


ORDERS: dict[str, EvictionOrder] = {"lru": lru, "fifo": fifo, "cost": cost}


class VictimSearch:
    """Looks at what belongs to a `AdapterCache`.

    placed: the adapters that hold a slot. copy_s: what bringing one back is expected to take.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        placed: Mapping[str, Adapter],
        free_slots: Sequence[int],
        extents: Extents,
        budget: Budget | None,
        order: EvictionOrder,
        copy_s: Callable[[Adapter], float],
    ) -> None:
        self._adapters = adapters
        self._placed = placed
        self._free_slots = free_slots
        self._extents = extents
        self._budget = budget
        self._order = order
        self._copy_s = copy_s

    @property
    def limit_bytes(self) -> int:
        """What the arena may hold now, without an eviction."""
        return self._extents.capacity if self._budget is None else self._budget.limit_bytes

    def for_image(
        self,
        digest: str,
        keep: Collection[str] = (),
        parkable: Sequence[str] = (),
        spare_fresh: bool = True,
        lacking: Collection[str] = (),
    ) -> list[str] | None:
        """Who would have to leave for it; None when even all of them would not be enough.

        Idle adapters go first. keep: none of these. parkable: adapters in use that may go too, in
        this order, once their rows are off the batch. An adapter that was loaded for a request and
        has not run yet is kept for it, else two of them could evict each other for ever. Only where
        the queue has one head, and nothing else may load, is spare_fresh off.
        """
        idle = self._order(self._candidates(spare_fresh, lacking))
        candidates = [c.digest for c in idle if c.digest not in keep]
        candidates += [victim for victim in parkable if victim not in keep]
        loading = self.loading()
        return _fewest(candidates, lambda victims: self._fits(digest, victims, loading))

    def for_pages(self, end: int, keep: Collection[str], wanted: bool) -> list[str] | None:
        """Who would have to leave for the arena to end at byte `end`, after sliding.

        Idle adapters only. keep: none of these. wanted: also those that a request waits for.
        """
        idle = self._order(self._candidates(spare_fresh=True))
        candidates = [c.digest for c in idle if c.digest not in keep and (wanted or not c.wanted)]
        loading = self.loading()
        return _fewest(candidates, lambda victims: self._ends_at(end, victims, loading))

    def spare_pages(self) -> int:
        """About how many KV pages idle adapters would leave."""
        if self._budget is None:
            return 0
        idle = sum(c.bytes for c in self._candidates(spare_fresh=True))
        return (self._extents.free + idle) // self._budget.page_bytes

    def pages_for(self, digest: str, keep: Collection[str]) -> int | None:
        """KV pages that must be free for it to come, once all idle adapters but `keep` have left.

        None when pages would not help: it is slots or the memory of others that it waits for.
        """
        assert self._budget is not None
        idle = [c.digest for c in self._candidates(spare_fresh=True) if c.digest not in keep]
        if not self._free_slots and not idle:
            return None
        size = self._adapters[digest].bytes
        end, hole = self._extents.packed(idle, immovable=self.loading())
        return self._budget.free_for(end if hole >= size else end + size)

    def loading(self) -> list[str]:
        return [a.digest for a in self._placed.values() if a.tier is Tier.LOADING]

    def _candidates(self, spare_fresh: bool, lacking: Collection[str] = ()) -> list[Candidate]:
        return [
            Candidate(
                a.digest,
                a.bytes,
                a.since_s,
                a.used_s,
                a.wanted,
                a.frequency * self._copy_s(a) / max(a.bytes, 1),
            )
            for a in self._placed.values()
            if a.tier is Tier.DEVICE
            and a.users == 0
            and not a.pinned
            and not (spare_fresh and a.fresh and a.wanted and a.digest not in lacking)
        ]

    def _fits(self, digest: str, victims: Sequence[str], loading: Collection[str]) -> bool:
        """Whether the image finds a slot and a hole, after sliding if need be."""
        if not self._free_slots and not victims:
            return False
        size, limit = self._adapters[digest].bytes, self.limit_bytes
        if limit - self._extents.used + self._bytes(victims) < size:
            return False
        end, hole = self._extents.packed(victims, immovable=loading)
        return max(hole, limit - limit % self._extents.alignment - end) >= size

    def _ends_at(self, end: int, victims: Sequence[str], loading: Collection[str]) -> bool:
        if self._extents.used - self._bytes(victims) > end:
            return False
        return self._extents.packed(victims, immovable=loading)[0] <= end

    def _bytes(self, digests: Sequence[str]) -> int:
        return sum(self._adapters[digest].bytes for digest in digests)


def _fewest(candidates: list[str], enough: Callable[[list[str]], bool]) -> list[str] | None:
    """The first of them that are enough, without those that a later one made needless.

    What is enough stays so when more leave: the number is found by halving.
    """
    if enough([]):
        return []
    if not enough(candidates):
        return None
    few, many = 0, len(candidates)
    while many - few > 1:
        middle = (few + many) // 2
        if enough(candidates[:middle]):
            many = middle
        else:
            few = middle
    *before, last = candidates[:many]
    return [*_needed(before, [last], enough), last]


def _needed(
    victims: list[str], others: list[str], enough: Callable[[list[str]], bool]
) -> list[str]:
    """Those of them that must leave besides `others`; the first ones stay where there is a choice.

    As if each were asked about in turn, but many are let off at once.
    """
    if not victims or enough(others):
        return []
    if len(victims) == 1:
        return victims
    middle = len(victims) // 2
    first, second = victims[:middle], victims[middle:]
    first = _needed(first, second + others, enough)
    return first + _needed(second, first + others, enough)
