"""When a starving adapter takes the place of one in use.

An adapter starves when requests wait for it and no idle adapter can leave for it. It gets a place
in one of two ways:

- drain: the victim takes no new requests until its rows have ended. Its place is then reserved for
  the starving adapter. The waiting requests that the victim may still take are fixed when the drain
  starts, and none of them may last longer than its running rows. A tolerance on what is *left*
  would grow with each request it admits.
- park: the victim's rows leave the batch with their KV pages, and resume after one image copy. A
  victim keeps its place for a slice, which starts with its first step and lasts several copies;
  else all time would go into swapping. Of the victims whose slice is over, the one with the most
  tokens left goes, because mean waits are shortest when nearly finished work finishes first. A
  victim that ends before the copies would be done is not parked but waited for. An adapter with a
  request that has no token yet may take any such place. An adapter whose requests all have tokens
  takes one only from a victim with more left, until it is due. So a new request gets its first
  token soon, and under overload long requests give way to short ones, instead of all being late.

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

# Shortest slice, in multiples of the time to copy one image in and the other back.
_COPIES_PER_SLICE = 5

# A parked adapter is due after at most this many turns.
_DUE_TURNS = 60

# Without parking, a drain starts after this many times the turns of all adapters.
_LATE_TURNS = 10


@dataclass(frozen=True, slots=True)
class Sharing:
    """How adapters take turns.

    drain_wait_threshold_s: how long an adapter starves before another is drained for it; 0: never.
    quantum_s: shortest slice.
    head_start_s: how much longer a parked adapter must have starved to go before one with a request
        that has no token yet (see `service_order.py`).
    """

    park: bool = True
    quantum_s: float = 0.5
    head_start_s: float = 0.2
    drain_wait_threshold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Drain:
    """The drain of one victim. admitted: ids of the waiting requests it may still take."""

    starving: str
    admitted: frozenset[str]


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

    def __init__(self, sharing: Sharing, adapter_cache: AdapterCache, costs: Costs) -> None:
        self.sharing = sharing
        self.drains: dict[str, Drain] = {}
        self.started = 0
        self._adapter_cache = adapter_cache
        self._costs = costs

    def may_admit(self, request: Request) -> bool:
        drain = self.drains.get(request.adapter_key) if request.adapter_key is not None else None
        return drain is None or request.id in drain.admitted

    def reserved_for_others(self, digest: str) -> set[str]:
        """Adapters whose place is reserved for an adapter other than `digest`."""
        return {victim for victim, drain in self.drains.items() if drain.starving != digest}

    def drained_for(self, digest: str) -> set[str]:
        return {victim for victim, drain in self.drains.items() if drain.starving == digest}

    def tick(self, paused: Collection[str]) -> None:
        """End drains whose starving adapter loads or stopped waiting, or whose victim left.

        paused: adapters that may not load yet. Their drains end too.

        Also end a drain if the victim's rows left before their first step. Such a victim is not
        evicted until its requests have run, and the drain would keep them out.
        """
        for victim, drain in list(self.drains.items()):
            starving = self._adapter_cache.adapters.get(drain.starving)
            waits = starving is not None and starving.starved_s is not None
            if (
                not waits
                or drain.starving in paused
                or not self._adapter_cache.usable(victim)
                or self._loads(drain.starving)
                or self._unused(victim)
            ):
                del self.drains[victim]

    def drain(
        self, digest: str, running: Iterable[Request], waiting: Iterable[Request], now_s: float
    ) -> None:
        """Start a drain for a starving adapter, unless it is too early or one is under way.

        With parking on, this is for when nothing may be parked. Without a threshold, only an
        adapter that waited very long then gets a drain.
        """
        adapter = self._adapter_cache.adapters[digest]
        threshold_s, starved_s = self.sharing.drain_wait_threshold_s, adapter.starved_s
        if self.sharing.park and not threshold_s:
            threshold_s = _LATE_TURNS * max(self._all_turns_s(adapter), self._turn_s(adapter))
        if not threshold_s or starved_s is None or now_s - starved_s < threshold_s:
            return
        if any(drain.starving == digest for drain in self.drains.values()):
            return
        left = _tokens_left(running)
        order = sorted(
            (a for a in self._in_use() if a.digest not in self.drains),
            key=lambda a: (left[a.digest], a.digest),
        )
        victims = self._adapter_cache.victim_search.for_image(
            digest,
            self.reserved_for_others(digest),
            [a.digest for a in order if a.digest != digest],
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
        """Victims whose rows to park for a starving adapter, none of `keep`. None: it has to wait.

        waiting: its own requests. If all of them have tokens and it is not due, it only takes the
            place of an adapter with more left.
        """
        if not self.sharing.park:
            return None
        left = _tokens_left(running)
        adapter = self._adapter_cache.adapters[digest]
        copy_s = self._adapter_cache.copy_s
        own_left = None
        if not self._due(adapter, waiting, now_s):
            own_left = max(r.remaining for r in waiting) / len(waiting)
        slice_over, ending = [], []
        for victim in self._in_use():
            copies_s = copy_s(victim) + copy_s(adapter)
            if left[victim.digest] * self._costs.decode_s <= copies_s:
                ending.append(victim)
            elif now_s - victim.slice_s >= self.slice_s(copies_s) and (
                own_left is None or left[victim.digest] / victim.users > own_left
            ):
                slice_over.append(victim)
        ending.sort(key=lambda a: (left[a.digest], a.digest))
        waited_for = self._victims(digest, keep, ending)
        if waited_for is not None:
            return Victims(closed=frozenset(waited_for) & {victim.digest for victim in ending})
        slice_over.sort(key=lambda a: (-left[a.digest], a.slice_s, a.digest))
        victims = self._victims(digest, keep, slice_over)
        return None if victims is None else Victims(digests=tuple(victims))

    def _due(self, adapter: Adapter, waiting: Sequence[Request], now_s: float) -> bool:
        """True if a request of it has no token, or it waited so long that it may take any turn."""
        if adapter.starved_s is None or not all(request.begun for request in waiting):
            return True
        return now_s - adapter.starved_s >= self._due_s(adapter)

    def _all_turns_s(self, adapter: Adapter) -> float:
        """Time until every absent adapter would have had a place, if all of them waited."""
        adapter_cache = self._adapter_cache
        places = max(len(adapter_cache.placed) - adapter_cache.pinned, 1)
        away = len(adapter_cache.adapters) - adapter_cache.pinned - places
        return self.bound_s(away, places, adapter.bytes)

    def _due_s(self, adapter: Adapter) -> float:
        """How long an adapter whose requests all have tokens waits for adapters with less left.

        It is due at once if one turn serves all absent adapters. With many turns it waits longer:
        if every adapter took its turn, each would be late.
        """
        turn_s = self._turn_s(adapter)
        others_s = self._all_turns_s(adapter) - turn_s
        return max(min(3 * others_s - turn_s, _DUE_TURNS * turn_s), 0.0)

    def _turn_s(self, adapter: Adapter) -> float:
        return self.bound_s(1, 1, adapter.bytes)

    def reserves_places_for(self, digest: str, keep: set[str], now_s: float) -> bool:
        """True if it has waited longer than one slice, so the next free places are reserved for it.

        Otherwise small images could forever take, one by one, the places that a large one needs
        together.
        """
        adapter = self._adapter_cache.adapters[digest]
        slice_s = self.slice_s(2 * self._costs.copy_s(adapter.bytes))
        if adapter.starved_s is None or now_s - adapter.starved_s <= slice_s:
            return False
        return self._victims(digest, keep, self._in_use()) is not None

    def slice_s(self, copies_s: float) -> float:
        """copies_s: time to copy one image in and the other back."""
        return max(self.sharing.quantum_s, _COPIES_PER_SLICE * copies_s)

    def bound_s(self, waiting: int, places: int, bytes_max: int) -> float:
        """The longest wait for a place, if `waiting` adapters share `places` unpinned ones.

        Each turn takes a slice and two copies. Without parking there is no bound.
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
        """Idle adapters, and then as many of `in_use` as needed, in that order."""
        return self._adapter_cache.victim_search.for_image(digest, keep, [a.digest for a in in_use])


def _tokens_left(running: Iterable[Request]) -> dict[str, int]:
    """Adapter → upper bound on the tokens left in its longest row."""
    left: dict[str, int] = {}
    for request in running:
        if request.adapter_key is not None:
            left[request.adapter_key] = max(left.get(request.adapter_key, 0), request.remaining)
    return left
