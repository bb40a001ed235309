"""Which adapters are loaded, and who makes room for them."""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.costs import Costs
from replica.scheduling.adapter import ArenaChange
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.drainer import Drainer, Victims
from replica.scheduling.request import Request
from replica.scheduling.running_set import RunningSet
from replica.scheduling.service_order import ServiceOrder
from replica.scheduling.timeline import Event, Timelines
from replica.scheduling.victims import Spared
from replica.scheduling.waiting import Waiting

# `adapter_key` of base requests if `base_slot` is shared: it takes a slot, but no bytes.
BASE_KEY = ""

# Parking resumes this long after pages or computing were last the bottleneck.
_CALM_S = 5.0

# If the waiting prompts take longer than this to prefill, computing is the bottleneck.
_PILE_S = 2.0

# After this many starving adapters found no place among those in use, a step tries no more: to try
# a thousand takes longer than the step. Those before them are more urgent or starve longer.
_TRIES = 8

# Rows are parked for a request only if its first token can come this soon.
_FIRST_TOKEN_S = 0.5


@dataclass(frozen=True, slots=True)
class Switches:
    """How the scheduler decides. The defaults are best; the others reproduce earlier servers.

    base_slot: "shared" makes the base model compete for a slot.
    on_miss: "block" stops the scan of the queue at the first request that cannot run.
    overlap: False stops the batch during a load.
    prefetch_depth: adapters that may be loaded beyond the free rows of the batch.
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
    """Plans loads. expected: digest → when its load in flight is expected to end."""

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
        self.order = ServiceOrder(waiting, adapter_cache, drainer.turns)
        self._in_flight_max = in_flight_max
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._running_set = running_set
        self._drainer = drainer
        self._costs = costs
        self._timelines = timelines
        self._short_s = -math.inf  # when pages or computing were last the bottleneck
        self._takes_turns = False  # in this step

    def plan(
        self, first: str | None, paused: Collection[str], now_s: float
    ) -> tuple[list[ArenaChange], set[str]]:
        """Begin the loads that fit. Adapters that do not fit take another's place, or wait.

        Also returns the adapters that take no new rows in this step, because their running rows end
        soon.

        first: the only adapter that may load, if `on_miss` is "block".
        paused: adapters that may not load yet.
        """
        arena_changes: list[ArenaChange] = []
        closed: set[str] = set()
        space = (
            self._running_set.rows_max
            - len(self._running_set.running)
            + self.switches.prefetch_depth
        )
        ahead = loaded_ahead(self._adapter_cache)
        pinned = self._adapter_cache.pinned_elsewhere(now_s)
        fits_ahead = -1  # the largest image that fits, but whose requests have no row yet
        pages_saved = False
        # The smallest images that found no idle victims, and none in use, in this step.
        none_idle = none_in_use = math.inf
        tries = 0
        for digest in itertools.chain(pinned, self._starving(first, now_s)):
            if self._adapter_cache.loading >= self._in_flight_max:
                break
            if digest in paused:
                continue
            size = self._adapter_cache.adapters[digest].bytes
            if size <= fits_ahead or (tries >= _TRIES and size >= none_idle):
                continue  # its requests have no row yet, or it would find no place
            if size >= none_idle and size >= none_in_use and not self._drainer.drains:
                continue
            draining = self._drainer.drained_for(digest)
            drained = any(not self._adapter_cache.adapters[d].users for d in draining)
            preload = digest in pinned
            if size >= none_idle and not drained and (preload or size >= none_in_use):
                continue
            spared, victims = self._spared(digest, preload, pages_saved, now_s), None
            if size < none_idle or drained:
                victims = self._idle_victims(digest, spared)
            if victims is not None:
                if ahead >= space and self.switches.skip:
                    fits_ahead = max(fits_ahead, size)
                    continue
                if victims and self._must_wait_for_copies(now_s):
                    none_idle = min(none_idle, size)
                    continue
            elif not preload:
                none_idle = min(none_idle, size)
                if not self._has_pages(digest, now_s):
                    continue  # it lacks pages: a place would not help it
                if draining and not self._drainer.sharing.park:
                    continue
                tries += 1
                taken = self._take_place(digest, spared, now_s)
                closed |= taken.closed
                victims = list(taken.digests) or None
                if victims is None and self._drainer.sharing.park:
                    none_in_use = min(none_in_use, size)
                    if self._drainer.reserves_places_for(digest, spared):
                        break
                if victims is None and not pages_saved and self._save_pages(digest, spared, now_s):
                    victims = self._idle_victims(digest, spared)
                    pages_saved = victims is None  # no other adapter takes these pages
            if victims is not None:
                arena_changes.append(self._begin(digest, victims, now_s))
                ahead += 1
        return arena_changes, closed

    def bring(self, request: Request, now_s: float) -> ArenaChange | None:
        """Without overlap: the change that loads its adapter before this step, if it must and can.

        With overlap none: an absent adapter loads beside the batch, as `plan` decides.
        """
        if self._running_set.placed(request):
            return None
        if self.switches.overlap:
            return None
        digest = request.adapter_key
        assert digest is not None
        pages = self._spared_pages(digest, now_s)
        spared = Spared(self._drainer.reserved_for_others(digest), pages)
        victims = self._idle_victims(digest, spared)
        if victims is None:
            self._drain(digest, pages, now_s)
            return None
        return self._begin(digest, victims, now_s)

    def loaded(self, digest: str, now_s: float) -> None:
        self.expected.pop(digest, None)
        for request in self._waiting.group(digest):
            self._timelines.note(request.id, now_s, Event.LOAD_DONE)

    def failed(self, digest: str, now_s: float) -> None:
        self.expected.pop(digest, None)
        for request in self._waiting.group(digest):
            self._timelines.note(request.id, now_s, Event.LOAD_FAILED)

    def _starving(self, first: str | None, now_s: float) -> Iterable[str]:
        """If pages are short, adapters with parked rows go first: only these rows can run.

        If pages or computing are the bottleneck, who starved longest goes first.
        """
        starving = self.order.digests()
        sharing = self._drainer.sharing.park and bool(starving)
        self._takes_turns = sharing and not self._bottleneck_is_elsewhere(now_s)
        starving = self._drainer.turns.in_order(starving, self._takes_turns, now_s)
        if not self.switches.skip:
            return [d for d in starving if d == first]
        if not self._running_set.parked or not self._running_set.short_of_pages:
            return starving
        parked = {r.adapter_key for r in self._running_set.parked.values() if r.pages}
        return sorted(starving, key=lambda digest: digest not in parked)

    def _spared(self, digest: str, pinned: bool, all_pages: bool, now_s: float) -> Spared:
        """What must not leave for this adapter. all_pages: nor may the arena take any page."""
        budget = self._adapter_cache.budget
        pages = self._spared_pages(digest, now_s)
        if budget is not None and all_pages:
            pages = budget.total
        keep = self._drainer.reserved_for_others(digest)
        if pinned or not self.switches.skip:
            return Spared(keep, pages)
        sooner = needed_sooner(digest, self._waiting, self._adapter_cache)
        sooner -= self._drainer.drained_for(digest)
        return Spared(keep | self._more_urgent(digest) | sooner, pages)

    def _more_urgent(self, digest: str) -> set[str]:
        """Adapters whose rows, or requests that wait for a row, are more urgent."""
        priority = self._waiting.head(digest).priority
        urgent = set()
        if self._waiting.most_urgent < priority:
            placed = filter(self._waiting.waited_for, self._adapter_cache.placed)
            urgent = {d for d in placed if self._waiting.head(d).priority < priority}
        for request in self._running_set.running.values():  # by priority
            if request.priority >= priority:
                break
            if request.adapter_key is not None:
                urgent.add(request.adapter_key)
        return urgent

    def _idle_victims(self, digest: str, spared: Spared) -> list[str] | None:
        """Victims among idle adapters.

        A fresh adapter is kept for the request it was loaded for, except if pages are short, that
        request has none, and `digest` has parked rows that hold some.
        """
        lacking: set[str] = set()
        if self._running_set.short_of_pages and self._holds_pages(digest):
            fresh = self._adapter_cache.fresh.values()
            lacking = {a.digest for a in fresh if a.wanted and not self._holds_pages(a.digest)}
        return self._adapter_cache.victim_search.for_image(
            digest, spared, spare_fresh=self.switches.skip, lacking=lacking
        )

    def _holds_pages(self, digest: str) -> bool:
        """True if the first request that waits for it was parked."""
        return self._waiting.waited_for(digest) and bool(self._waiting.head(digest).pages)

    def _spared_pages(self, digest: str, now_s: float) -> int:
        """Pages that the arena must not take for this adapter.

        These are for the growth of running rows, and for a request that has waited longer.
        """
        budget = self._adapter_cache.budget
        if budget is None:
            return 0
        starved_s = self._adapter_cache.adapters[digest].starved_s
        since_s = math.inf if starved_s is None else starved_s
        saved = self._running_set.saved.before(since_s, now_s)
        return saved + max(self._running_set.demand.peak - budget.headroom, 0)

    def _save_pages(self, digest: str, spared: Spared, now_s: float) -> bool:
        """Save pages for an adapter that starved too long for memory that KV pages hold.

        New rows leave these pages free, and parked rows lose theirs. The same is done if nothing
        runs, because nothing else would free any. False if neither is the case.
        """
        starved_s = self._adapter_cache.adapters[digest].starved_s
        if self._adapter_cache.budget is None or starved_s is None:
            return False
        count = self._adapter_cache.victim_search.pages_for(digest, spared)
        patience_s = self._running_set.saved.wait_max_s
        alone = self._running_set.nothing_runs and not self._adapter_cache.loading
        late = patience_s is not None and now_s - starved_s > patience_s
        if count is None or not (alone or late):
            return False
        priority = self._waiting.head(digest).priority
        self._running_set.saved.save_for_adapter(count, starved_s, priority)
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
        if not self.switches.overlap:  # the copy is done before the rows run
            self.loaded(digest, now_s)
            evictions = self._adapter_cache.loaded(digest, now_s)
            assert not evictions, "an adapter left though a request waits for it"
        return change

    def _must_wait_for_copies(self, now_s: float) -> bool:
        """True if another copy is under way for longer than a step.

        Copies run one after another. Until this one's turn comes, its victim keeps its place, and
        may be asked for again.
        """
        return max(self.expected.values(), default=now_s) > now_s + self._costs.decode_s

    def _take_place(self, digest: str, spared: Spared, now_s: float) -> Victims:
        """Take the place of an adapter in use: park its rows, let them end, or start a drain."""
        if self._must_wait_for_copies(now_s):
            return Victims()
        waiting = self._waiting.group(digest)
        if self._drainer.sharing.park:
            if not self._takes_turns:
                self._drain(digest, spared.pages, now_s)
                return Victims()
            if not waiting[0].begun and not self._first_token_is_near(waiting[0]):
                return Victims()
        victims = self._drainer.park(digest, spared, self._running_set.running.values(), now_s)
        if victims is None:
            self._drain(digest, spared.pages, now_s)
            return Victims()
        if victims.digests and not self._running_set.park_all(victims.digests, waiting[0], now_s):
            self._drain(digest, spared.pages, now_s)
            return Victims()
        return victims

    def _bottleneck_is_elsewhere(self, now_s: float) -> bool:
        """True if pages or computing are the bottleneck, or were a moment ago.

        More places would not help then, and parked rows hold pages that others could finish with.
        """
        pages_short = self._running_set.short_of_pages or not self._running_set.demand.met
        if pages_short or self._prompts_pile_up():
            self._short_s = now_s
        return now_s - self._short_s < _CALM_S

    def _prompts_pile_up(self) -> bool:
        parked = self._running_set.parked.values()
        computed = sum(min(request.computed, len(request.prompt)) for request in parked)
        return self._costs.prefill_s(self._waiting.prompt_tokens - computed) > _PILE_S

    def _first_token_is_near(self, request: Request) -> bool:
        """True if its first token can come soon after the prompts in progress."""
        ahead = sum(max(len(r.prompt) - r.computed, 0) for r in self._running_set.running.values())
        tokens = ahead + len(request.prompt) - request.computed
        return not ahead or self._costs.prefill_s(tokens) <= _FIRST_TOKEN_S

    def _has_pages(self, digest: str, now_s: float) -> bool:
        """True if it finds pages, or waited so long that pages are saved once it has a place."""
        if self._running_set.has_pages_for(self._waiting.head(digest)):
            return True
        starved_s = self._adapter_cache.adapters[digest].starved_s
        patience_s = self._running_set.saved.wait_max_s
        return starved_s is not None and patience_s is not None and now_s - starved_s > patience_s

    def _drain(self, digest: str, pages: int, now_s: float) -> None:
        """Not with `on_miss` "block": there all adapters in use drain by themselves."""
        if self.switches.skip:
            keep = self._drainer.reserved_for_others(digest) | self._more_urgent(digest)
            running = self._running_set.running.values()
            self._drainer.drain(digest, Spared(keep, pages), running, self._waiting, now_s)


def needed_sooner(digest: str, waiting: Waiting, adapter_cache: AdapterCache) -> set[str]:
    """Idle adapters that an earlier request waits for (it lacks a row or pages)."""
    head = waiting.key(waiting.head(digest))
    return {
        a.digest
        for a in adapter_cache.slots.on_device()
        if a.users == 0 and a.wanted and waiting.key(waiting.head(a.digest)) < head
    }


def loaded_ahead(adapter_cache: AdapterCache) -> int:
    """Adapters that are loading, or loaded for a request, and not used by a row yet."""
    return adapter_cache.loading + sum(a.wanted for a in adapter_cache.fresh.values())
