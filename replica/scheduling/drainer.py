"""When a starving adapter takes the place of one in use.

An adapter starves when requests wait for it and no idle adapter can leave for it. It gets a place
in one of two ways:

- drain: the victim takes no new requests until its rows have ended. Its place is then reserved for
  the starving adapter. The waiting requests that the victim may still take are fixed when the drain
  starts, and none of them may last longer than its running rows. A tolerance on what is *left*
  would grow with each request it admits.
- park: the victim's rows leave the batch with their KV pages, and resume after one image copy. A
  victim keeps its place for a slice, which starts with its first step and lasts several copies;
  else all time would go into swapping. A victim that ends before the copies would be done is not
  parked but waited for. `turns.py` says who may take whose place. Of these the least urgent goes
  first, and none that is more urgent than the starving adapter.

If KV pages or computing are the bottleneck (`Loads`), nothing is parked: a place would not help,
and parked rows hold pages. Only an adapter that waited very long then gets a drain.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cluster.costs import Costs
from cluster.values import Tier
from replica.scheduling.adapter import Adapter
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.request import Request
from replica.scheduling.turns import Turns
from replica.scheduling.victims import Spared
from replica.scheduling.waiting import Waiting

# Without parking, a drain starts after this many times the turns of all adapters.
_LATE_TURNS = 10


@dataclass(frozen=True, slots=True)
class Drain:
    """The drain of one victim.

    admitted: ids of the waiting requests it may still take, besides those more urgent than
        `priority`, the starving adapter's.
    """

    starving: str
    admitted: frozenset[str]
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Victims:
    """The victims chosen for a starving adapter.

    digests: adapters whose rows are parked.
    closed: adapters that take no new rows, because their running rows end soon.
    """

    digests: tuple[str, ...] = ()
    closed: frozenset[str] = frozenset()


class Drainer:
    """Chooses victims among the adapters in use. Owns the drains."""

    def __init__(self, turns: Turns, adapter_cache: AdapterCache, costs: Costs) -> None:
        self.turns = turns
        self.sharing = turns.sharing
        self.drains: dict[str, Drain] = {}
        self.started = 0
        self._adapter_cache = adapter_cache
        self._costs = costs

    def may_admit(self, request: Request) -> bool:
        drain = self.drains.get(request.adapter_key) if request.adapter_key is not None else None
        if drain is None or request.id in drain.admitted:
            return True
        return request.priority < drain.priority

    def reserved_for_others(self, digest: str) -> set[str]:
        """Adapters whose place is reserved for an adapter other than `digest`."""
        return {victim for victim, drain in self.drains.items() if drain.starving != digest}

    def drained_for(self, digest: str) -> set[str]:
        return {victim for victim, drain in self.drains.items() if drain.starving == digest}

    def tick(self, paused: Collection[str], waiting: Waiting) -> None:
        """End drains whose starving adapter loads or stopped waiting, or whose victim left. And if
        its most urgent request is gone: the drain would keep out some that are more urgent now.

        paused: adapters that may not load yet. Their drains end too.

        Also end a drain if the victim's rows left before their first step. Such a victim is not
        evicted until its requests have run, and the drain would keep them out.
        """
        for victim, drain in list(self.drains.items()):
            starving = self._adapter_cache.adapters.get(drain.starving)
            waits = starving is not None and starving.starved_s is not None
            if (
                not waits
                or waiting.head(drain.starving).priority > drain.priority
                or drain.starving in paused
                or not self._adapter_cache.usable(victim)
                or self._loads(drain.starving)
                or self._unused(victim)
            ):
                del self.drains[victim]

    def drain(
        self,
        digest: str,
        spared: Spared,
        running: Iterable[Request],
        waiting: Iterable[Request],
        now_s: float,
    ) -> None:
        """Start a drain for a starving adapter, unless it is too early or one is under way.

        spared: its adapters are not drained.

        With parking on, this is for when nothing may be parked. Without a threshold, only an
        adapter that waited very long then gets a drain.
        """
        adapter = self._adapter_cache.adapters[digest]
        threshold_s, starved_s = self.sharing.drain_wait_threshold_s, adapter.starved_s
        if self.sharing.park and not threshold_s:
            threshold_s = _LATE_TURNS * self._all_turns_s(adapter)
        if not threshold_s or starved_s is None or now_s - starved_s < threshold_s:
            return
        if any(drain.starving == digest for drain in self.drains.values()):
            return
        free = [a for a in self._in_use() if a.digest not in self.drains]
        left = _tokens_left(running) if free else {}
        order = sorted(free, key=lambda a: (left[a.digest], a.digest))
        victims = self._adapter_cache.victim_search.for_image(
            digest, spared, [a.digest for a in order if a.digest != digest]
        )
        if not victims:
            return
        waiting = list(waiting)
        priority = min((r.priority for r in waiting if r.adapter_key == digest), default=0)
        for victim in victims:
            admitted = frozenset(
                r.id
                for r in waiting
                if r.adapter_key == victim and r.remaining <= left.get(victim, 0)
            )
            self.drains[victim] = Drain(digest, admitted, priority)
            self.started += 1

    def park(
        self,
        digest: str,
        spared: Spared,
        running: Iterable[Request],
        now_s: float,
    ) -> Victims | None:
        """Victims whose rows to park for a starving adapter; None: it waits."""
        if not self.sharing.park:
            return None
        left, urgency = _tokens_left(running), _most_urgent(running)
        adapter = self._adapter_cache.adapters[digest]
        copy_s = self._adapter_cache.copy_s
        own_copy_s = copy_s(adapter)
        slice_over, ending = [], []
        for victim in self._in_use():
            copies_s = copy_s(victim) + own_copy_s
            if left[victim.digest] * self._costs.decode_s <= copies_s:
                ending.append(victim)
            elif now_s - victim.slice_s >= self.turns.slice_s(copies_s) and self.turns.may_take(
                digest, victim.digest, urgency[victim.digest]
            ):
                slice_over.append(victim)
        if not (ending or slice_over):
            return None
        ending.sort(key=lambda a: (left[a.digest], a.digest))
        waited_for = self._victims(digest, spared, ending)
        if waited_for is not None:
            return Victims(closed=frozenset(waited_for) & {victim.digest for victim in ending})
        slice_over.sort(key=lambda a: (-urgency[a.digest], self.turns.worth(a.digest)))
        victims = self._victims(digest, spared, slice_over)
        return None if victims is None else Victims(digests=tuple(victims))

    def _all_turns_s(self, adapter: Adapter) -> float:
        """Time until every absent adapter would have had a place, if all of them waited."""
        adapter_cache = self._adapter_cache
        places = max(len(adapter_cache.placed) - adapter_cache.pinned, 1)
        away = len(adapter_cache.adapters) - adapter_cache.pinned - places
        return self.turns.all_s(max(away, 1), places, adapter.bytes)

    def reserves_places_for(self, digest: str, spared: Spared) -> bool:
        """True if it is overdue, so the next free places are reserved for it.

        Otherwise small images could forever take, one by one, the places that a large one needs
        together.
        """
        if not self.turns.overdue(digest):
            return False
        return self._victims(digest, spared, self._in_use()) is not None

    def _unused(self, digest: str) -> bool:
        adapter = self._adapter_cache.adapters[digest]
        return adapter.fresh and adapter.users == 0

    def _loads(self, digest: str) -> bool:
        return self._adapter_cache.adapters[digest].tier is Tier.LOADING

    def _in_use(self) -> list[Adapter]:
        on_device = self._adapter_cache.slots.on_device()
        return [a for a in on_device if a.users > 0 and not a.pinned]

    def _victims(self, digest: str, spared: Spared, in_use: Sequence[Adapter]) -> list[str] | None:
        """Idle adapters, and then as many of `in_use` as needed, in that order."""
        parkable = [adapter.digest for adapter in in_use]
        return self._adapter_cache.victim_search.for_image(digest, spared, parkable)


def _tokens_left(running: Iterable[Request]) -> dict[str, int]:
    """Adapter → upper bound on the tokens left in its longest row."""
    left: dict[str, int] = {}
    for request in running:
        if request.adapter_key is not None:
            left[request.adapter_key] = max(left.get(request.adapter_key, 0), request.remaining)
    return left


def _most_urgent(running: Iterable[Request]) -> dict[str, int]:
    """Adapter → priority of its most urgent row. running: by priority."""
    urgency: dict[str, int] = {}
    for request in running:
        if request.adapter_key is not None:
            urgency.setdefault(request.adapter_key, request.priority)
    return urgency
