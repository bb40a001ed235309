"""Which adapters leave the device for an image or for KV pages. A search changes nothing."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.values import Tier
from replica.scheduling.adapter import Adapter
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.slots import Slots


class Candidate(NamedTuple):
    """An adapter that may leave the device. A tuple for speed: a search makes many.

    wanted: a request waits for it.
    placed_s: when it reached the device.
    used_s: when a row last started or stopped running with it.
    value: log2 of uses per second × seconds to reload ÷ bytes, plus a term equal for all
        (greedy-dual, Cao and Irani 1997, with a decayed frequency instead of its clock).
    """

    digest: str
    placed_s: float
    used_s: float
    wanted: bool
    value: float


class Spared(NamedTuple):
    """What stays when an image needs room.

    adapters: never chosen as victims.
    pages: KV pages that stay free besides the headroom, if images share the memory with them.
    """

    adapters: Collection[str] = ()
    pages: int = 0


EvictionOrder = Callable[[Iterable[Candidate]], list[Candidate]]


def lru(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Least recently used first; adapters that requests wait for come last."""
    return sorted(candidates, key=lambda c: (c.wanted, c.used_s, c.digest))


def fifo(candidates: Iterable[Candidate]) -> list[Candidate]:
    """First in, first out; adapters that requests wait for come last."""
    return sorted(candidates, key=lambda c: (c.wanted, c.placed_s, c.digest))


def cost(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Cheapest to lose first; adapters that requests wait for come last."""
    return sorted(candidates, key=lambda c: (c.wanted, c.value, c.used_s, c.digest))


ORDERS: dict[str, EvictionOrder] = {"lru": lru, "fifo": fifo, "cost": cost}


class VictimSearch:
    """Searches the adapters of an `AdapterCache` for victims.

    copy_s: expected seconds to reload an adapter.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        slots: Slots,
        extents: Extents,
        budget: Budget | None,
        order: EvictionOrder,
        copy_s: Callable[[Adapter], float],
    ) -> None:
        self._adapters = adapters
        self._slots = slots
        self._extents = extents
        self._budget = budget
        self._order = order
        self._copy_s = copy_s

    def limit_bytes(self, reserved: int = 0) -> int:
        """Bytes that the arena may hold now, without an eviction.

        reserved: KV pages that stay free besides the headroom.
        """
        budget = self._budget
        return self._extents.capacity if budget is None else budget.limit_bytes(reserved)

    def for_image(
        self,
        digest: str,
        spared: Spared = Spared(),
        parkable: Sequence[str] = (),
        spare_fresh: bool = True,
        lacking: Collection[str] = (),
    ) -> list[str] | None:
        """Victims that make room for the image; None if even all candidates are not enough.

        parkable: adapters in use that may also go, after idle ones and in this order, once their
            rows have left the batch.
        spare_fresh: keep an adapter that was loaded for a request and has not run yet. Otherwise
            two could evict each other forever. It is off only if the first request blocks the rest:
            then no other adapter may load.
        lacking: fresh adapters that `spare_fresh` does not keep.
        """
        idle = [a for a in self._idle(spare_fresh, lacking) if a.digest not in spared.adapters]
        parkable = [victim for victim in parkable if victim not in spared.adapters]
        limit, loading = self.limit_bytes(spared.pages), self.loading()
        return self._first(
            idle, parkable, lambda victims: self._fits(digest, victims, limit, loading)
        )

    def for_pages(self, end: int, keep: Collection[str], wanted: bool) -> list[str] | None:
        """Victims that let the arena end at byte `end`, after sliding. Idle adapters only.

        keep: never chosen. wanted: adapters that a request waits for may also go.
        """
        idle = [a for a in self._idle() if a.digest not in keep and (wanted or not a.wanted)]
        loading = self.loading()
        return self._first(idle, (), lambda victims: self._ends_at(end, victims, loading))

    def evictable_pages(self) -> int:
        """Roughly how many KV pages idle adapters and free arena bytes would yield."""
        if self._budget is None:
            return 0
        idle = sum(adapter.bytes for adapter in self._idle())
        return (self._extents.free + idle) // self._budget.page_bytes

    def pages_for(self, digest: str, spared: Spared) -> int | None:
        """KV pages that must be free for the image, once all idle adapters have left.

        None if pages would not help: it waits for a slot, or for memory that other adapters hold.
        """
        assert self._budget is not None
        idle = [a.digest for a in self._idle() if a.digest not in spared.adapters]
        if self._slots.full and not idle:
            return None
        size = self._adapters[digest].bytes
        end, hole = self._extents.packed(idle, immovable=self.loading())
        return self._budget.free_for(end if hole >= size else end + size, spared.pages)

    def loading(self) -> list[str]:
        return [a.digest for a in self._slots.placed.values() if a.tier is Tier.LOADING]

    def _idle(self, spare_fresh: bool = True, lacking: Collection[str] = ()) -> list[Adapter]:
        """The adapters that may leave. See `for_image`."""
        return [
            a
            for a in self._slots.on_device()
            if a.users == 0
            and not a.pinned
            and not (spare_fresh and a.fresh and a.wanted and a.digest not in lacking)
        ]

    def _first(
        self,
        idle: Sequence[Adapter],
        parkable: Sequence[str],
        enough: Callable[[list[str]], bool],
    ) -> list[str] | None:
        """The first that are enough, idle ones in the order of eviction; None if all are not."""
        if enough([]):
            return []
        if not enough([*[a.digest for a in idle], *parkable]):
            return None
        ordered = self._order(
            Candidate(a.digest, a.since_s, a.used_s, a.wanted, self._value(a)) for a in idle
        )
        return _shortest([*[c.digest for c in ordered], *parkable], enough)

    def _value(self, adapter: Adapter) -> float:
        if not adapter.bytes:
            return -math.inf  # a reload is free
        return adapter.heat + math.log2(self._copy_s(adapter) / adapter.bytes)

    def _fits(
        self, digest: str, victims: Sequence[str], limit: int, loading: Collection[str]
    ) -> bool:
        """True if the image finds a slot and a hole, after sliding if needed."""
        if self._slots.full and not victims:
            return False
        size = self._adapters[digest].bytes
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


def _shortest(candidates: list[str], enough: Callable[[list[str]], bool]) -> list[str]:
    """The first candidates that are enough, less those that a later one makes redundant.

    All are enough, and none is not. A larger set is enough if a smaller one is, so bisection finds
    how many. It begins with few, since an image mostly needs the place of one or two.
    """
    few, many = 0, len(candidates)
    while many - few > 1:
        middle = min(2 * few + 1, (few + many) // 2)
        if enough(candidates[:middle]):
            many = middle
        else:
            few = middle
    *before, last = candidates[:many]
    return [*_without_redundant(before, [last], enough), last]


def _without_redundant(
    victims: list[str], others: list[str], enough: Callable[[list[str]], bool]
) -> list[str]:
    """The victims that must leave besides `others`; given a choice, the first ones stay.

    Equivalent to testing victims one by one; bisection skips runs of redundant ones.
    """
    if not victims or enough(others):
        return []
    if len(victims) == 1:
        return victims
    middle = len(victims) // 2
    first, second = victims[:middle], victims[middle:]
    first = _without_redundant(first, second + others, enough)
    return first + _without_redundant(second, first + others, enough)
