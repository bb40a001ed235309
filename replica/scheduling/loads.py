"""Which adapters come, and who makes room for them: loads, held prompts, places taken."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.costs import Costs
from cluster.values import Tier
from replica.scheduling.adapter import ArenaChange
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.drainer import Drainer
from replica.scheduling.request import Request
from replica.scheduling.running_set import RunningSet
from replica.scheduling.service_order import ServiceOrder
from replica.scheduling.timeline import Event, Timelines
from replica.scheduling.waiting import Waiting

# The place that the base model takes when `base_slot` is shared: no bytes, but a slot.
BASE_KEY = ""

# So long after pages or computing were short rows are parked again.
_CALM_S = 5.0

# Where the prompts that wait take longer than that, computing is what is short.
_PILE_S = 2.0

# A request for whom rows are parked is to have its first token as soon as that.
_FIRST_TOKEN_S = 0.5

# A copy that is not there when it was expected is given this part of a prefill more.
_LATE = 0.1


@dataclass(frozen=True, slots=True)
class Switches:
    """How it decides; the defaults are the best ones, the others what servers did before.

    base_slot: shared: the base model competes for a slot. on_miss: block: the first request that
    cannot run stops the scan. overlap: else a load stops the batch. prefetch_depth: adapters that
    may be loaded beyond those there is batch space for.
    """

    base_slot: Literal["pinned", "shared"] = "pinned"
    on_miss: Literal["skip", "block"] = "skip"
    overlap: bool = True
    prefetch_depth: int = 8

    @property
    def base_pinned(self) -> bool:
        return self.base_slot == "pinned"

    @property
    def skip(self) -> bool:
        return self.on_miss == "skip"


class Loads:
    """Plans loads; `expected` says until when each one in flight is expected to end."""

    def __init__(
        self,
        switches: Switches,
        in_flight_max: int,
        adapter_cache: AdapterCache,
        waiting: Waiting,
        running_set: RunningSet,
        drainer: Drainer,
        costs: Costs,
        timelines: Timelines,
    ) -> None:
        self.switches = switches
        self.expected: dict[str, float] = {}
        self.order = ServiceOrder(waiting, adapter_cache, drainer.sharing.head_start_s)
        self._in_flight_max = in_flight_max
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._running_set = running_set
        self._drainer = drainer
        self._costs = costs
        self._timelines = timelines
        self._short_s = -math.inf  # when pages or computing were short for the last time
        self._overloaded: bool | None = None  # in this step

    def plan(self, first: str | None, now_s: float, closed: set[str]) -> list[ArenaChange]:
        """Begin the loads there is room for; those who find none take a place, or wait.

        first: where the first request blocks the rest, its adapter alone may come. closed: gets
        the adapters that take nobody new in this step, for they will end soon.
        """
        arena_changes: list[ArenaChange] = []
        self._overloaded = None
        space = (
            self._running_set.rows_max
            - len(self._running_set.running)
            + self.switches.prefetch_depth
        )
        ahead = loaded_ahead(self._adapter_cache)
        pinned = self._adapter_cache.pinned_elsewhere(now_s)
        idle_unused = -1
        patient = False
        none_idle = none_used = math.inf  # bytes from which on nobody finds such victims any more
        for digest in itertools.chain(pinned, self._starving(first)):
            if self._adapter_cache.loading >= self._in_flight_max:
                break
            size = self._adapter_cache.adapters[digest].bytes
            self._reserve(digest, now_s, all_of_them=patient)
            mine = bool(self._drainer.drained_for(digest))
            unasked = digest in pinned
            if size <= idle_unused:
                continue  # there is a place for it, but no space in the batch yet
            if size >= none_idle and not mine and (unasked or size >= none_used):
                continue
            keep, victims = self._keep(digest, unasked), None
            if size < none_idle or mine:
                victims = self._idle_victims(digest, keep)
            if victims is not None:
                if ahead >= space and self.switches.skip:
                    idle_unused = max(idle_unused, size)
                    continue
            elif not unasked:
                none_idle = min(none_idle, size)
                if not self._has_pages(digest, now_s):
                    continue  # it starves for pages: a place would not help it
                victims = self._take_place(digest, keep, now_s, closed)
                begun = self._waiting.all_begun(digest)
                if victims is None and self._drainer.sharing.park and not begun:
                    none_used = min(none_used, size)
                    if self._drainer.saves_for(digest, keep, now_s):
                        break
                if victims is None and not patient and self._waits_for_pages(digest, keep, now_s):
                    victims = self._idle_victims(digest, keep)
                    patient = victims is None  # nobody else takes the pages that it waits for
            if victims is not None:
                arena_changes.append(self._begin(digest, victims, now_s))
                ahead += 1
        return arena_changes

    def bring(self, request: Request, arena_changes: list[ArenaChange], now_s: float) -> bool:
        """Whether its adapter is there. Without overlap it is loaded now, and the batch waits."""
        if self._running_set.placed(request):
            return True
        assert request.adapter_key is not None
        self._reserve(request.adapter_key, now_s)
        if self.switches.overlap:
            return False
        victims = self._idle_victims(request.adapter_key, self._drainer.kept(request.adapter_key))
        if victims is None:
            self._drain(request.adapter_key, now_s)
            return False
        arena_changes.append(self._begin(request.adapter_key, victims, now_s))
        return True

    def hold_until(self, step_tokens_max: int, now_s: float) -> float | None:
        """Until when prompts of adapters that just came wait for those about to come.

        One prefill of a group costs little more than that of its first member. Of waiting for none,
        one, … all of those on their way, the way with the least sum of waits is taken, and none is
        taken for longer than the prefill of all of them. None: no need to wait.
        """
        if not self.expected or not self.switches.overlap:
            return None
        fresh = [
            a
            for a in self._adapter_cache.placed.values()
            if a.fresh and a.wanted and a.tier is Tier.DEVICE
        ]
        here = [r.tokens - r.computed for a in fresh for r in self._waiting.group(a.digest)]
        if not here:
            return None
        prefill_s = self._costs.prefill_s(min(max(here), step_tokens_max))
        if now_s - min(a.since_s for a in fresh) >= prefill_s:
            return None
        late_s = prefill_s * _LATE
        expected = ((end if end > now_s else end + late_s, d) for d, end in self.expected.items())
        coming = sorted((end, digest) for end, digest in expected if end > now_s)
        ends = [end for end, _ in coming]
        counts = [len(here), *(len(self._waiting.group(digest)) for _, digest in coming)]
        ways = [
            (_ends_sum_s(start_s, awaited, counts, ends, prefill_s), start_s)
            for awaited, start_s in enumerate([now_s, *ends])
        ]
        start_s = min(ways)[1]
        return None if start_s == now_s else start_s

    def holds(self, request: Request) -> bool:
        """It is one of those that `hold_until` is about."""
        return (
            request.adapter_key is not None
            and self._adapter_cache.adapters[request.adapter_key].fresh
        )

    def loaded(self, digest: str, now_s: float) -> None:
        self.expected.pop(digest, None)
        for request in self._waiting.group(digest):
            self._timelines.note(request.id, now_s, Event.LOAD_DONE)

    def failed(self, digest: str, now_s: float) -> None:
        self.expected.pop(digest, None)
        for request in self._waiting.group(digest):
            self._timelines.note(request.id, now_s, Event.LOAD_FAILED)

    def _starving(self, first: str | None) -> Iterable[str]:
        """Where pages are short, adapters whose rows hold some go first: only these can run."""
        starving = self.order.digests()
        if not self.switches.skip:
            return [d for d in starving if d == first]
        if not self._running_set.parked or not self._running_set.short:
            return starving
        parked = {request.adapter_key for request in self._running_set.parked.values()}
        return sorted(starving, key=lambda digest: digest not in parked)

    def _keep(self, digest: str, pinned: bool) -> set[str]:
        keep = self._drainer.kept(digest)
        if pinned or not self.switches.skip:
            return keep
        sooner = needed_sooner(digest, self._waiting, self._adapter_cache)
        return keep | (sooner - self._drainer.drained_for(digest))

    def _idle_victims(self, digest: str, keep: set[str]) -> list[str] | None:
        """One that was loaded for a request without pages does not keep its place from rows that
        hold some.
        """
        lacking: set[str] = set()
        if self._running_set.short and self._holds_pages(digest):
            placed = self._adapter_cache.placed.values()
            lacking = {
                a.digest for a in placed if a.fresh and a.wanted and not self._holds_pages(a.digest)
            }
        return self._adapter_cache.victim_search.for_image(
            digest, keep, spare_fresh=self.switches.skip, lacking=lacking
        )

    def _holds_pages(self, digest: str) -> bool:
        """The first of those that wait for it was parked."""
        return self._waiting.waited_for(digest) and bool(self._waiting.head(digest).pages)

    def _reserve(self, digest: str, now_s: float, all_of_them: bool = False) -> None:
        """It leaves rows their growth, and the pages for a request that waits for them longer than
        anyone for it.
        """
        budget, starved_s = (
            self._adapter_cache.budget,
            self._adapter_cache.adapters[digest].starved_s,
        )
        if budget is not None:
            since_s = math.inf if starved_s is None else starved_s
            saved = self._running_set.saved_before(since_s, now_s)
            growth = max(self._running_set.peak - budget.headroom, 0)
            budget.reserved = budget.total if all_of_them else saved + growth

    def _waits_for_pages(self, digest: str, keep: set[str], now_s: float) -> bool:
        """Where it starved for too long for memory that KV pages hold, new rows leave it them.

        Parked rows give theirs up for it then, and also when nothing else would free any.
        """
        budget, starved_s = (
            self._adapter_cache.budget,
            self._adapter_cache.adapters[digest].starved_s,
        )
        if budget is None or starved_s is None:
            return False
        count = self._adapter_cache.victim_search.pages_for(digest, keep)
        patience_s = self._running_set.page_wait_max_s
        alone = self._running_set.still and not self._adapter_cache.loading
        late = patience_s is not None and now_s - starved_s > patience_s
        if count is None or not (alone or late):
            return False
        self._running_set.keep_free(count, starved_s)
        self._running_set.free_parked(count, now_s)
        return True

    def _begin(self, digest: str, victims: Sequence[str], now_s: float) -> ArenaChange:
        change = self._adapter_cache.make_room(digest, victims, now_s)
        assert change.load is not None
        self._running_set.rename(change.page_moves)
        after_s = max([now_s, *self.expected.values()])
        self.expected[digest] = after_s + self._costs.copy_s(change.load.bytes, change.load.source)
        for request in self._waiting.group(digest):
            self._timelines.note(request.id, now_s, Event.LOAD_STARTED)
        if not self.switches.overlap:  # whoever carries out the plan waits for the copy
            self.loaded(digest, now_s)
            evictions = self._adapter_cache.loaded(digest, now_s)
            assert not evictions, "an adapter that someone waits for does not leave"
        return change

    def _take_place(
        self, digest: str, keep: set[str], now_s: float, closed: set[str]
    ) -> list[str] | None:
        """Another's place for a starving adapter: now (its rows are parked), soon, or not yet.

        Copies go one after the other: until this one's turn comes, the place is of use where it is.
        """
        if max(self.expected.values(), default=now_s) > now_s + self._costs.decode_s:
            return None
        waiting = self._waiting.group(digest)
        if self._drainer.sharing.park:
            if self._overloaded is None:
                self._overloaded = self._places_are_not_what_is_short(now_s)
            if self._overloaded:
                self._drain(digest, now_s)
                return None
            if not waiting[0].begun and not self._first_token_is_near(waiting[0]):
                return None
        victims = self._drainer.park(
            digest, keep, self._running_set.running.values(), waiting, now_s
        )
        if victims is None:
            self._drain(digest, now_s)
            return None
        closed |= victims.closed
        if not victims.digests:
            return None
        if not self._running_set.park_all(victims.digests, self._waiting.head(digest), now_s):
            self._drain(digest, now_s)
            return None
        return list(victims.digests)

    def _places_are_not_what_is_short(self, now_s: float) -> bool:
        """But pages or computing are, or were of late: places alone would help nobody, and rows
        that are parked hold pages that others could end with.
        """
        if self._running_set.short or not self._running_set.ample or self._prompts_pile_up():
            self._short_s = now_s
        return now_s - self._short_s < _CALM_S

    def _prompts_pile_up(self) -> bool:
        tokens = 0
        for request in self._waiting:
            tokens += max(len(request.prompt) - request.computed, 0)
            if self._costs.prefill_s(tokens) > _PILE_S:
                return True
        return False

    def _first_token_is_near(self, request: Request) -> bool:
        """After the prompts that are being computed."""
        ahead = sum(max(len(r.prompt) - r.computed, 0) for r in self._running_set.running.values())
        tokens = ahead + len(request.prompt) - request.computed
        return not ahead or self._costs.prefill_s(tokens) <= _FIRST_TOKEN_S

    def _has_pages(self, digest: str, now_s: float) -> bool:
        """Or waited so long that pages are to be saved for it, which takes a place first."""
        if self._running_set.has_pages_for(self._waiting.head(digest)):
            return True
        starved_s = self._adapter_cache.adapters[digest].starved_s
        patience_s = self._running_set.page_wait_max_s
        return starved_s is not None and patience_s is not None and now_s - starved_s > patience_s

    def _drain(self, digest: str, now_s: float) -> None:
        """Where the first request blocks the rest, all adapters in use drain by themselves."""
        if self.switches.skip:
            self._drainer.drain(digest, self._running_set.running.values(), self._waiting, now_s)


def _ends_sum_s(
    start_s: float, awaited: int, counts: Sequence[int], ends: Sequence[float], prefill_s: float
) -> float:
    """Sum of the times at which all prefills end, when the first one starts with `awaited` more.

    counts: requests that are here, then those that come at each of `ends`. After the first prefill
    each of the following takes what has come by then.
    """
    now_s, total_s = start_s, 0.0
    taken, here = 0, awaited + 1
    while taken < len(counts):
        while here < len(counts) and ends[here - 1] <= now_s:
            here += 1
        if here == taken:
            now_s, here = ends[taken - 1], taken + 1
        now_s += prefill_s
        total_s += sum(counts[taken:here]) * now_s
        taken = here
    return total_s


def needed_sooner(digest: str, waiting: Waiting, adapter_cache: AdapterCache) -> set[str]:
    """Idle adapters that an earlier request waits for (for batch space or pages)."""
    head = waiting.key(waiting.head(digest))
    return {
        a.digest
        for a in adapter_cache.placed.values()
        if a.tier is Tier.DEVICE
        and a.users == 0
        and a.wanted
        and waiting.key(waiting.head(a.digest)) < head
    }


def loaded_ahead(adapter_cache: AdapterCache) -> int:
    """Adapters on their way or placed that no row has used yet."""
    return adapter_cache.loading + sum(
        a.fresh and a.wanted for a in adapter_cache.placed.values() if a.tier is Tier.DEVICE
    )
