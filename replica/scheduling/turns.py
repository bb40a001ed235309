"""Which adapters are worth a place: those whose turns let requests meet their targets.

A request is on time while it can still meet both targets: for the time to its first token (TTFT),
and for the mean time of each later token (TPOT). To meet the second, its adapter needs a place for
a share of the time only, its *duty*: the time that its tokens take ÷ the time left for them. So
adapters can take turns, and all be on time, if their duties together fit the places. If they do
not, and all took turns, all would be late. So places are *funded*: adapters with the most on-time
requests per second of work come first, until their duties fill the places. Few requests with much
left are the first to be given up, and what is begun is finished.

Absent adapters get places in this order, and may park the rows of these others, once their slices
are over:

- overdue, as it waited for many times the turns of all that wait: any. So each wait is bounded.
- pressing, as it is funded and would be late two turns from now: any that is not pressing, if it is
  funded, or ends fewer requests a second.
- the rest, longest waiting first: any that is not pressing, and ends far fewer requests a second.
  That is good for the mean time to the last token, also of requests that are late anyway.

A parked row resumes within `bound_s`, and keeps its place for a slice then. So it is parked at most
once for each slice that it needs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.costs import Costs
from cluster.values import Tier
from replica.scheduling.adapter import Adapter
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.growth import Growth
from replica.scheduling.request import Request
from replica.scheduling.waiting import Waiting

# Shortest slice, in multiples of the time to copy one image in and the other back.
_COPIES_PER_SLICE = 5

# An adapter is overdue once it waited this many times the turns of all. If all its requests have
# tokens, it waits longer: each turn of an overdue adapter delays rows that began, so with many of
# them all rows would take turns and end late.
_OVERDUE = 3
_OVERDUE_BEGUN = 30

# An adapter is pressing this many turns before it would be late: others are pressing too.
_AHEAD = 2

# How many times faster a late adapter must end requests to take another's place.
_FASTER = 2.0

# Clients set `max_tokens` far above what they get. Few outputs are longer than two mean ones.
_OUTPUTS = 2.0

# A TPOT target below this many steps cannot be met beside others. This is aimed at instead.
_TPOT_STEPS = 1.25


@dataclass(frozen=True, slots=True)
class Sharing:
    """How adapters take turns.

    quantum_s: shortest slice.
    ttft_target_s, tpot_target_s: what requests should meet.
    drain_wait_threshold_s: how long an adapter starves before another is drained for it; 0: never.
    """

    park: bool = True
    quantum_s: float = 0.5
    ttft_target_s: float = 1.0
    tpot_target_s: float = 0.05
    drain_wait_threshold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What a place is worth to one adapter.

    on_time: its requests that can still meet both targets.
    late_s: when the first of these is late, if it gets no place before; infinity if there is none.
    new: one of these has no token yet.
    work_s: time with a place until all of these have ended.
    duty: share of the time that it needs a place for these, with one load in each turn, to be done
        two turns early.
    ends_per_s: requests, also late ones, that it can end a second with a place.
    until_s: when to take stock again, if its requests do not change before.
    """

    on_time: int
    late_s: float
    new: bool
    work_s: float
    duty: float
    ends_per_s: float
    until_s: float


class Turns:
    """Compares the adapters that have or want a place. In each step `in_order` comes first."""

    def __init__(
        self,
        sharing: Sharing,
        adapter_cache: AdapterCache,
        waiting: Waiting,
        running: Mapping[str, Request],
        costs: Costs,
        growth: Growth,
    ) -> None:
        self.sharing = sharing
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._running = running
        self._costs = costs
        self._growth = growth
        self._now_s = 0.0
        self._starving = 0
        self._standings: dict[str, Standing] = {}
        self._funded: set[str] = set()

    def forget(self, digest: str) -> None:
        """Its requests changed."""
        self._standings.pop(digest, None)

    def in_order(self, starving: Sequence[str], parks: bool, now_s: float) -> Sequence[str]:
        """The order in which absent adapters get places; priority comes before all else.

        starving: those that requests wait for, of one priority by who waited longest.
        parks: rows may be parked in this step. Otherwise nothing changes the order.
        """
        self._now_s, self._starving = now_s, len(starving)
        if not parks:
            return starving
        self._take_stock(starving)
        return sorted(starving, key=self._rank)

    def may_take(self, digest: str, victim: str, priority: int) -> bool:
        """True if the rows of `victim` may be parked for it, once the slice is over.

        priority: of the victim's most urgent row.
        """
        if self.overdue(digest) or self._waiting.head(digest).priority < priority:
            return True
        if self.pressing(victim):
            return False
        own, its = self._standings[digest].ends_per_s, self._standings[victim].ends_per_s
        if not self.pressing(digest):
            return own > _FASTER * its
        return victim in self._funded or own > its

    def standing(self, digest: str) -> Standing:
        """Of an adapter with a place or one that starves, as of this step."""
        return self._standings[digest]

    def worth(self, victim: str) -> tuple[bool, float, str]:
        """Sorts victims: the first to park comes first."""
        ends_per_s = self._standings[victim].ends_per_s
        return self.pressing(victim), ends_per_s, victim

    def pressing(self, digest: str) -> bool:
        """True if it is funded, and would be late if it waited for two more turns."""
        if digest not in self._funded:
            return False
        standing = self._standings[digest]
        turn_s = self._turn_s(self._adapter_cache.adapters[digest])
        return standing.new or standing.late_s - self._now_s < _AHEAD * turn_s

    def overdue(self, digest: str) -> bool:
        """True if it waited so long that it may take any place whose slice is over."""
        adapter = self._adapter_cache.adapters[digest]
        if adapter.starved_s is None:
            return False
        places = len(self._adapter_cache.placed) - self._adapter_cache.pinned
        turns = -(-self._starving // max(places, 1))
        most = _OVERDUE_BEGUN if self._waiting.all_begun(digest) else _OVERDUE
        waited_s = self._now_s - adapter.starved_s
        if waited_s < most * turns * self.sharing.quantum_s:
            return False  # no turn is shorter than that; most of a thousand end here
        return waited_s >= most * turns * self._turn_s(adapter)

    def slice_s(self, copies_s: float) -> float:
        """copies_s: time to copy one image in and the other back."""
        return max(self.sharing.quantum_s, _COPIES_PER_SLICE * copies_s)

    def all_s(self, waiting: int, places: int, bytes_max: int) -> float:
        """Time for one turn each, if `waiting` adapters share `places` unpinned ones.

        A turn is a slice and two copies.
        """
        copies_s = 2 * self._costs.copy_s(bytes_max)
        return -(-waiting // max(places, 1)) * (self.slice_s(copies_s) + copies_s)

    def bound_s(self, waiting: int, places: int, bytes_max: int) -> float:
        """The longest wait for a place: until it is overdue, and the turns of all that are.

        Without parking there is no bound.
        """
        return (_OVERDUE_BEGUN + 1) * self.all_s(waiting, places, bytes_max)

    def _turn_s(self, adapter: Adapter) -> float:
        """With copies from the tier that the adapter would be loaded from."""
        copies_s = 2 * self._adapter_cache.copy_s(adapter)
        return self.slice_s(copies_s) + copies_s

    def _rank(self, digest: str) -> tuple[int, int, float, str]:
        priority = self._waiting.head(digest).priority
        if self.pressing(digest) and not self.overdue(digest):
            return priority, 1, self._standings[digest].late_s, digest
        starved_s = self._adapter_cache.adapters[digest].starved_s
        assert starved_s is not None
        return priority, 0 if self.overdue(digest) else 2, starved_s, digest

    def _take_stock(self, starving: Sequence[str]) -> None:
        """Update the standings that are too old, and then who is funded."""
        standings, now_s = self._standings, self._now_s
        placed = [a.digest for a in self._adapter_cache.placed.values() if a.claims]
        old = {
            digest
            for digest in (*placed, *starving)
            if digest not in standings or standings[digest].until_s <= now_s
        }
        running: dict[str, list[Request]] = {}
        if not old.isdisjoint(placed):
            for request in self._running.values():
                if request.adapter_key in old:
                    running.setdefault(request.adapter_key, []).append(request)
        for digest in old:
            requests = [*running.get(digest, ()), *self._waiting.group(digest)]
            standings[digest] = self._standing(digest, requests)
        if old or len(standings) > len(placed) + len(starving):
            self._standings = {digest: standings[digest] for digest in (*placed, *starving)}
            self._funded = self._fund()

    def _standing(self, digest: str, requests: Sequence[Request]) -> Standing:
        adapter, now_s = self._adapter_cache.adapters[digest], self._now_s
        decode_s = self._costs.decode_s
        absent = adapter.tier is not Tier.DEVICE
        copy_s = self._adapter_cache.copy_s(adapter) if absent else 0.0
        tpot_s = self.sharing.tpot_target_s
        if decode_s >= tpot_s:
            tpot_s = _TPOT_STEPS * decode_s
        margin_s = _AHEAD * self._turn_s(adapter)
        most = _OUTPUTS * self._growth.output_tokens
        on_time, work_s, duty, late_s, new = 0, 0.0, 0.0, math.inf, False
        lefts = []
        for request in requests:
            left_s = min(request.remaining, most) * decode_s
            lefts.append(left_s)
            first_s = request.first_s
            if first_s is None:
                first_s = request.arrived_s + self.sharing.ttft_target_s
                ready_s = first_s - copy_s
                if not request.begun:
                    ready_s -= self._costs.prefill_s(len(request.prompt) - request.computed)
                if ready_s < now_s:
                    continue
            elif first_s - request.arrived_s > self.sharing.ttft_target_s:
                continue
            else:
                ready_s = math.inf
            ends_s = first_s + tpot_s * (len(request.output) - 1) + tpot_s * left_s / decode_s
            ready_s = min(ready_s, ends_s - left_s - copy_s)
            if ready_s < now_s:
                continue
            on_time += 1
            new |= request.first_s is None
            work_s = max(work_s, left_s)
            duty = max(duty, left_s / max(ends_s - now_s - margin_s, left_s))
            late_s = min(late_s, ready_s)
        lefts.sort()
        ends_per_s = max(
            (ended / (left_s + copy_s) for ended, left_s in enumerate(lefts, 1)), default=0.0
        )
        slice_s = self.slice_s(2 * self._adapter_cache.copy_s(adapter))
        duty = min(duty * (1 + self._adapter_cache.copy_s(adapter) / slice_s), 1.0)
        until_s = min(now_s + self.sharing.quantum_s * (1.0 if absent else 0.1), late_s)
        return Standing(on_time, late_s, new, work_s, duty, ends_per_s, until_s)

    def _fund(self) -> set[str]:
        """The adapters with the most on-time requests per second of work, until places are full.

        Pinned adapters have their places anyway.
        """
        adapter_cache = self._adapter_cache
        room = max(adapter_cache.victim_search.limit_bytes() - adapter_cache.pinned_bytes, 1)
        places = max(adapter_cache.slots.count - adapter_cache.pinned, 1)
        funded, order = set(), []
        for digest, standing in self._standings.items():
            adapter = adapter_cache.adapters[digest]
            if standing.on_time and adapter.pinned:
                funded.add(digest)
            elif standing.on_time:
                share = max(adapter.bytes / room, 1 / places)
                per_work = standing.on_time / max(standing.work_s * share, 1e-9)
                order.append((-per_work, digest, share * standing.duty))
        free = 1.0
        for _, digest, needed in sorted(order):
            if needed <= free:
                free -= needed
                funded.add(digest)
        return funded
