"""When a starving adapter gets the place of one that is in use.

An adapter starves when requests wait for it and no idle adapter can leave for it. Two ways out:

- drain: the victim takes no new requests until its rows have ended; its place is then kept for the
  one it was drained for. Which waiting requests it may still take is fixed when the drain starts,
  and none of them may last longer than the rows that run: a tolerance on what is *left* would grow
  with each request it admits.
- park: the victim's rows leave the batch with their KV pages and come back by one image copy. A
  victim keeps its place for a slice that starts with its first step and lasts several copies, else
  all time went into swapping. Of those whose slice is over, the one with the most left goes: mean
  waits are shortest when what is nearly done is done. A victim that will end before the copies were
  done is waited out. Who has no token yet gets a place for that; who was parked takes one only from
  a victim with more left to do, until it is due. So a new request has its first token soon, and
  what is long gives way to what is short where there is too much to do, instead of all being late.

Where pages or computing are what is short (`Loads`), nobody is parked: a place would help nobody,
and what is parked holds pages. There an adapter that waited very long is drained for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.costs import Costs
from cluster.values import Tier
from replica.scheduling.adapter import Adapter
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.request import Request

# A slice lasts at least so many times as long as bringing one image in and the other back.
_COPIES_A_SLICE = 5

# A parked adapter is due after so many turns at the latest.
_DUE_TURNS = 60

# Where nobody is parked, an adapter is drained for after so many times the turns of all.
_LATE_TURNS = 10


@dataclass(frozen=True, slots=True)
class Sharing:
    """drain_wait_threshold_s: how long an adapter starves before another is drained; 0: never.

    quantum_s: the shortest slice. head_start_s: how much longer a parked adapter may starve than
    one with a request that still has no token (see `service_order.py`).
    """

    park: bool = True
    quantum_s: float = 0.5
    head_start_s: float = 0.2
    drain_wait_threshold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Drain:
    """What one victim goes through. admitted: ids of the waiting requests it may still take."""

    starving: str
    admitted: frozenset[str]


@dataclass(frozen=True, slots=True)
class Victims:
    """Who makes place for a starving adapter.

    digests: adapters whose rows are parked. closed: adapters that take no new rows, because the
    ones they have end soon.
    """

    digests: tuple[str, ...] = ()
    closed: frozenset[str] = frozenset()


class Drainer:
    """Chooses victims among the adapters in use. Owns the drains."""

    def __init__(self, sharing: Sharing, adapter_cache: AdapterCache, costs: Costs) -> None:
        self.sharing = sharing
        self.drains: dict[str, Drain] = {}
        self.started = 0
        self._adapter_cache = adapter_cache
        self._costs = costs

    def may_admit(self, request: Request) -> bool:
        drain = self.drains.get(request.adapter_key) if request.adapter_key is not None else None
        return drain is None or request.id in drain.admitted

    def kept(self, digest: str) -> set[str]:
        """Adapters whose place will be someone else's than `digest`'s."""
        return {victim for victim, drain in self.drains.items() if drain.starving != digest}

    def drained_for(self, digest: str) -> set[str]:
        return {victim for victim, drain in self.drains.items() if drain.starving == digest}

    def tick(self) -> None:
        """End the drains whose starving adapter wants no place any more, or has one.

        And those of a victim whose only rows left before their first step: it has not run, so its
        place is kept for them, and they could not get on.
        """
        for victim, drain in list(self.drains.items()):
            starving = self._adapter_cache.adapters.get(drain.starving)
            waits = starving is not None and starving.starved_s is not None
            if (
                not waits
                or not self._adapter_cache.usable(victim)
                or self._loads(drain.starving)
                or self._unused(victim)
            ):
                del self.drains[victim]

    def drain(
        self, digest: str, running: Iterable[Request], waiting: Iterable[Request], now_s: float
    ) -> None:
        """Start draining for a starving adapter, unless it is too early or under way.

        With parking that is only where nothing may be parked, and for who waited very long.
        """
        adapter = self._adapter_cache.adapters[digest]
        threshold_s, starved_s = self.sharing.drain_wait_threshold_s, adapter.starved_s
        if self.sharing.park and not threshold_s:
            threshold_s = _LATE_TURNS * max(self._all_turns_s(adapter), self._turn_s(adapter))
        if not threshold_s or starved_s is None or now_s - starved_s < threshold_s:
            return
        if any(drain.starving == digest for drain in self.drains.values()):
            return
        left = _longest(running)
        order = sorted(
            (a for a in self._in_use() if a.digest not in self.drains),
            key=lambda a: (left[a.digest], a.digest),
        )
        victims = self._adapter_cache.victim_search.for_image(
            digest, self.kept(digest), [a.digest for a in order if a.digest != digest]
        )
        waiting = list(waiting)
        for victim in victims or ():
            admitted = frozenset(
                r.id
                for r in waiting
                if r.adapter_key == victim and r.remaining <= left.get(victim, 0)
            )
            self.drains[victim] = Drain(digest, admitted)
            self.started += 1

    def park(
        self,
        digest: str,
        keep: set[str],
        running: Iterable[Request],
        waiting: Sequence[Request],
        now_s: float,
    ) -> Victims | None:
        """Whose rows to park for a starving adapter, none of `keep`; None while it has to wait.

        waiting: its own requests. Where all of them have tokens already, it takes the place of one
        that has more left to do, until it has waited for as long as its turn takes to come.
        """
        if not self.sharing.park:
            return None
        left = _longest(running)
        adapter = self._adapter_cache.adapters[digest]
        copy_s = self._adapter_cache.copy_s
        own = None
        if not self._due(adapter, waiting, now_s):
            own = max(r.remaining for r in waiting) / len(waiting)
        over, ending = [], []
        for victim in self._in_use():
            copies_s = copy_s(victim) + copy_s(adapter)
            if left[victim.digest] * self._costs.decode_s <= copies_s:
                ending.append(victim)
            elif now_s - victim.slice_s >= self.slice_s(copies_s) and (
                own is None or left[victim.digest] / victim.users > own
            ):
                over.append(victim)
        ending.sort(key=lambda a: (left[a.digest], a.digest))
        wait_out = self._victims(digest, keep, ending)
        if wait_out is not None:
            return Victims(closed=frozenset(wait_out) & {victim.digest for victim in ending})
        over.sort(key=lambda a: (-left[a.digest], a.slice_s, a.digest))
        victims = self._victims(digest, keep, over)
        return None if victims is None else Victims(digests=tuple(victims))

    def _due(self, adapter: Adapter, waiting: Sequence[Request], now_s: float) -> bool:
        """A request of it has no token yet, or it waited for so long that it takes any turn."""
        if adapter.starved_s is None or not all(request.begun for request in waiting):
            return True
        return now_s - adapter.starved_s >= self._due_s(adapter)

    def _all_turns_s(self, adapter: Adapter) -> float:
        """Until each adapter that has no place now would have had one, if all of them waited."""
        adapter_cache = self._adapter_cache
        places = max(len(adapter_cache.placed) - adapter_cache.pinned, 1)
        away = len(adapter_cache.adapters) - adapter_cache.pinned - places
        return self.bound_s(away, places, adapter.bytes)

    def _due_s(self, adapter: Adapter) -> float:
        """How long one with tokens waits for those with less left. Where all others have their turn
        in one, it is due at once; where turns are many, each would be late if all took them.
        """
        turn_s = self._turn_s(adapter)
        others_s = self._all_turns_s(adapter) - turn_s
        return max(min(3 * others_s - turn_s, _DUE_TURNS * turn_s), 0.0)

    def _turn_s(self, adapter: Adapter) -> float:
        return self.bound_s(1, 1, adapter.bytes)

    def saves_for(self, digest: str, keep: set[str], now_s: float) -> bool:
        """Whether nobody else may take a place, for this one found none for longer than a slice.

        Small images would for ever take, one by one, the places that a large one needs together.
        """
        adapter = self._adapter_cache.adapters[digest]
        slice_s = self.slice_s(2 * self._costs.copy_s(adapter.bytes))
        if adapter.starved_s is None or now_s - adapter.starved_s <= slice_s:
            return False
        return self._victims(digest, keep, self._in_use()) is not None

    def slice_s(self, copies_s: float) -> float:
        """copies_s: one image in and the other back."""
        return max(self.sharing.quantum_s, _COPIES_A_SLICE * copies_s)

    def bound_s(self, waiting: int, places: int, bytes_max: int) -> float:
        """The longest wait for a place, when `waiting` adapters share `places` unpinned ones.

        Each turn of all places takes a slice and a copy; without parking there is no such bound.
        """
        copies_s = 2 * self._costs.copy_s(bytes_max)
        turns = -(-waiting // max(places, 1))
        return turns * (self.slice_s(copies_s) + copies_s)

    def _unused(self, digest: str) -> bool:
        adapter = self._adapter_cache.adapters[digest]
        return adapter.fresh and adapter.users == 0

    def _loads(self, digest: str) -> bool:
        return self._adapter_cache.adapters[digest].tier is Tier.LOADING

    def _in_use(self) -> list[Adapter]:
        adapters = self._adapter_cache.placed.values()
        return [a for a in adapters if a.tier is Tier.DEVICE and a.users > 0 and not a.pinned]

    def _victims(self, digest: str, keep: set[str], in_use: Sequence[Adapter]) -> list[str] | None:
        """Idle adapters and some of `in_use`, the first ones before the others."""
        return self._adapter_cache.victim_search.for_image(digest, keep, [a.digest for a in in_use])


def _longest(running: Iterable[Request]) -> dict[str, int]:
    """Adapter → upper bound of the tokens left in its longest row."""
    left: dict[str, int] = {}
    for request in running:
        if request.adapter_key is not None:
            left[request.adapter_key] = max(left.get(request.adapter_key, 0), request.remaining)
    return left
