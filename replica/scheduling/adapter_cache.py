"""Which adapters are on the device, loading or leaving, and what keeps them there.

    DISK or HOST ── make_room ──> LOADING ── loaded ──> DEVICE ── evict ──> HOST if kept, else DISK
                                   │    ^
                            failed │    │ make_room, at `retry_s` or later
                                   v    │
                                   FAILED

Slot 0 of the device directory is the base model. It needs no load and is not kept here. A request
accepted for a version runs with that version, whatever its name points at by then. So a forgotten
adapter stays until its last request has ended and its copy is done.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from cluster.values import AdapterState, Tier
from replica.scheduling.adapter import (
    Adapter,
    ArenaChange,
    Evict,
    Load,
    PageMove,
    Pins,
    Slide,
    no_room,
)
from replica.scheduling.backoff import Backoff
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents, Shift
from replica.scheduling.host_tier import HostTier
from replica.scheduling.slots import Slots
from replica.scheduling.victims import EvictionOrder, VictimSearch


class AdapterCache:
    """The device directory and the arena's bytes.

    slots: directory rows, without the base model's.
    order: which adapters to evict first.
    copy_s: expected seconds to load an image of a given size from a given tier.
    retry_s, retry_max_s: first and longest pause before a failed load is retried.
    host: the host tier; None keeps no image in host memory.
    budget: set if the arena shares its memory with KV pages; the arena then grows before it evicts.
    """

    def __init__(
        self,
        extents: Extents,
        slots: int,
        order: EvictionOrder,
        copy_s: Callable[[int, Tier], float],
        retry_s: float,
        retry_max_s: float,
        host: HostTier | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.extents = extents
        self.budget = budget
        self.host = host or HostTier(0)
        self.slots = Slots(slots)
        self.adapters: dict[str, Adapter] = {}
        self.touched: set[str] = set()  # may have begun or ceased to starve; for `ServiceOrder`
        self.fresh: dict[str, Adapter] = {}  # loaded, and no row has run with them since
        self.loading = 0
        self.loads = self.evictions = 0
        self.wasted = 0  # loads evicted before a row used them
        self._copy_s = copy_s
        self.victim_search = VictimSearch(
            self.adapters, self.slots, extents, budget, order, self.copy_s
        )
        self.backoff = Backoff(retry_s, retry_max_s)
        self._changed: set[str] = set()
        self._pins = Pins()

    def register(self, digest: str, path: str, size: int, pinned: bool, now_s: float) -> None:
        """`size`: bytes of the image, at most `most_bytes`."""
        assert self.extents.aligned(size) <= self.most_bytes
        adapter = self.adapters.get(digest)
        if adapter is None:
            size = self.extents.aligned(size)
            adapter = self.adapters[digest] = Adapter(digest, path, size, False, now_s)
            self._pins.add(adapter)
        else:
            adapter.path, adapter.failures = path, 0
            if adapter.tier is Tier.FAILED:
                self.backoff.end(digest)
                adapter.tier, adapter.since_s = self._source_tier(digest), now_s
            adapter.leaving = False
        self._pins.pin(adapter, pinned)
        self._touch(digest)

    @property
    def pinned(self) -> int:
        return len(self._pins.pinned)

    @property
    def pinned_bytes(self) -> int:
        return sum(adapter.bytes for adapter in self._pins.pinned.values())

    def refusal(self, digest: str, size: int, pinned: bool) -> str | None:
        """Why the image can never be served here; None if it can."""
        size = self.extents.aligned(size)
        others = self._pins.others(self.adapters.get(digest))
        return no_room(size, pinned, others, self.most_bytes, self.slots.count)

    @property
    def most_bytes(self) -> int:
        """The largest size the arena can reach."""
        return self.extents.capacity if self.budget is None else self.budget.most_bytes

    @property
    def placed(self) -> Mapping[str, Adapter]:
        """Adapters with a slot."""
        return self.slots.placed

    def forget(self, digest: str) -> list[Evict]:
        adapter = self.adapters.get(digest)
        if adapter is None:
            return []
        adapter.leaving = True
        self._pins.pin(adapter, False)
        return self._drop_if_unused(adapter)

    def usable(self, digest: str) -> bool:
        adapter = self.adapters.get(digest)
        return adapter is not None and adapter.tier is Tier.DEVICE

    def pinned_elsewhere(self, now_s: float) -> list[str]:
        """Pinned adapters to load now though no request waits for them."""
        return [
            a.digest
            for _, a in sorted(self._pins.pinned.items())
            if not a.wanted
            and (a.tier in (Tier.DISK, Tier.HOST) or (a.tier is Tier.FAILED and now_s >= a.retry_s))
        ]

    def slot(self, digest: str | None) -> int:
        if digest is None:
            return 0
        slot = self.adapters[digest].slot
        assert slot is not None
        return slot

    def claim(self, digest: str, now_s: float) -> None:
        """A request for it was accepted."""
        adapter = self.adapters[digest]
        assert not adapter.leaving
        adapter.claims += 1
        self._starve(adapter, now_s)

    def unclaim(self, digest: str) -> list[Evict]:
        """A request for it ended. Its row must have been released."""
        adapter = self.adapters[digest]
        assert adapter.claims > adapter.users
        adapter.claims -= 1
        if not adapter.wanted:
            adapter.starved_s = None
            self.touched.add(digest)
        return self._drop_if_unused(adapter)

    def hold(self, digest: str) -> None:
        """A request for it ended while a step in flight names the adapter."""
        self.adapters[digest].held += 1

    def let_go(self, digest: str) -> list[Evict]:
        """The last step that named a held request has committed."""
        adapter = self.adapters[digest]
        assert adapter.held > 0
        adapter.held -= 1
        return self._drop_if_unused(adapter)

    def acquire(self, digest: str, now_s: float) -> None:
        """A row is about to run with it."""
        adapter = self.adapters[digest]
        assert adapter.tier is Tier.DEVICE and adapter.wanted
        if adapter.fresh:
            self._not_fresh(adapter)
            adapter.slice_s = now_s
        adapter.use(now_s)
        self.host.touch(digest)
        adapter.users += 1
        adapter.used_s = now_s

    def release(self, digest: str, now_s: float) -> None:
        """A row stopped running. Its request waits again, or ends with `unclaim`."""
        adapter = self.adapters[digest]
        assert adapter.users > 0
        self.host.touch(digest)
        adapter.users -= 1
        adapter.used_s = now_s

    def make_room(self, digest: str, victims: Sequence[str], now_s: float) -> ArenaChange:
        """Evict `victims` (see `VictimSearch.for_image`), make a hole, and begin the load."""
        adapter = self.adapters[digest]
        assert adapter.tier in (Tier.DISK, Tier.HOST, Tier.FAILED)
        evictions = tuple(self._evict(self.adapters[v], now_s) for v in victims)
        for victim in victims:
            self.extents.give_back(victim)
        shifts: list[Shift] = []
        offset = self.extents.take(digest, adapter.bytes)
        if offset is None:
            shifts = self.extents.slide(immovable=self.victim_search.loading())
            offset = self.extents.take(digest, adapter.bytes)
        page_moves: tuple[PageMove, ...] = ()
        if offset is None and self.budget is not None:
            page_moves = self.budget.grow(self.extents.end + adapter.bytes)
            offset = self.extents.take(digest, adapter.bytes)
        assert offset is not None, "the victims free too few bytes"
        slides = self._slides(shifts)
        slot = self.slots.take(adapter)
        adapter.tier, adapter.since_s = Tier.LOADING, now_s
        self.backoff.end(digest)
        self.loading += 1
        self.loads += 1
        self._touch(digest)
        source = self._source_tier(digest)
        self.host.touch(digest)
        load = Load(digest, adapter.path, slot, offset, adapter.bytes, source)
        return ArenaChange(evictions, slides, load, page_moves)

    def make_pages(
        self, count: int, keep: Collection[str], wanted: bool, now_s: float
    ) -> ArenaChange | None:
        """Give up memory for `count` KV pages. None, and nothing changed, if that is impossible.

        Only idle adapters leave, and none of `keep`. Adapters that a request waits for leave only
        if `wanted`. An adapter that was loaded for a request and has not run yet never leaves.
        """
        assert self.budget is not None
        end = self.extents.capacity - count * self.budget.page_bytes
        victims = self.victim_search.for_pages(end, keep, wanted)
        if victims is None:
            return None
        evictions = tuple(self._evict(self.adapters[v], now_s) for v in victims)
        for victim in victims:
            self.extents.give_back(victim)
        shifts = self.extents.slide(self.victim_search.loading()) if self.extents.end > end else []
        self.budget.shrink(count)
        return ArenaChange(evictions, self._slides(shifts), None)

    def keep_on_host(self, digest: str) -> None:
        """Host memory holds its image from now on; older images may be dropped for it."""
        for dropped in self.host.keep(digest, self.adapters[digest].bytes):
            self._dropped_from_host(dropped)

    def begin_on_host(self, digest: str) -> None:
        """Host memory holds its image before its first load."""
        adapter = self.adapters[digest]
        assert adapter.tier is Tier.DISK
        self.keep_on_host(digest)
        adapter.tier = Tier.HOST

    def drop_from_host(self) -> bool:
        """Drop the least recently used image from host memory. False if there is none."""
        dropped = self.host.drop_oldest()
        if dropped is not None:
            self._dropped_from_host(dropped)
        return dropped is not None

    def copy_s(self, adapter: Adapter) -> float:
        """Expected seconds to load it, from the tier it would be loaded from."""
        return self._copy_s(adapter.bytes, self._source_tier(adapter.digest))

    def loaded(self, digest: str, now_s: float) -> list[Evict]:
        adapter = self.adapters[digest]
        assert adapter.tier is Tier.LOADING
        self.loading -= 1
        adapter.tier, adapter.since_s, adapter.used_s = Tier.DEVICE, now_s, now_s
        adapter.fresh, adapter.failures, adapter.starved_s = True, 0, None
        self.fresh[digest] = adapter
        self._touch(digest)
        return self._drop_if_unused(adapter)

    def failed(self, digest: str, reason: str, now_s: float) -> None:
        """The load failed. It may be retried after a pause that doubles with each failure."""
        adapter = self.adapters[digest]
        assert adapter.tier is Tier.LOADING
        self.loading -= 1
        self._quarantine(adapter, reason, now_s)

    def lost(self, digest: str, reason: str, now_s: float) -> None:
        """Without overlap: a load that was assumed done has failed. No row uses the adapter."""
        adapter = self.adapters[digest]
        assert adapter.tier is Tier.DEVICE and adapter.users == 0
        self._quarantine(adapter, reason, now_s)

    def _quarantine(self, adapter: Adapter, reason: str, now_s: float) -> None:
        self.extents.give_back(adapter.digest)
        self.slots.give_back(adapter)
        adapter.tier, adapter.since_s = Tier.FAILED, now_s
        self._not_fresh(adapter)
        self.backoff.start(adapter, reason, now_s)
        self._touch(adapter.digest)
        self._starve(adapter, now_s)
        self._drop_if_unused(adapter)

    def entries(
        self, epoch_s: float = 0.0, digests: Iterable[str] | None = None
    ) -> list[AdapterState]:
        """States to publish. A digest that is not registered is `absent`.

        epoch_s: Unix time at which this clock was 0. digests: None for all registered ones.
        """
        entries = []
        for digest in sorted(filter(None, self.adapters if digests is None else digests)):
            adapter = self.adapters.get(digest)
            if adapter is None:
                entries.append(AdapterState(digest, Tier.ABSENT, 0, epoch_s))
            else:
                entries.append(
                    AdapterState(
                        digest,
                        adapter.tier,
                        adapter.bytes,
                        adapter.since_s + epoch_s,
                        adapter.reason,
                    )
                )
        return entries

    def changes(self, epoch_s: float = 0.0) -> list[AdapterState]:
        """Entries that changed since the last call."""
        if not self._changed:
            return []
        entries = self.entries(epoch_s, self._changed)
        self._changed.clear()
        return entries

    def check(self) -> None:
        self.extents.check()
        self.host.check()
        for adapter in self.adapters.values():
            kept = adapter.digest in self.host
            assert kept or adapter.tier is not Tier.HOST
            assert not kept or adapter.tier is not Tier.DISK
        self.slots.check(self.adapters.values())
        failed = {a.digest: a for a in self.adapters.values() if a.tier is Tier.FAILED}
        assert failed == self.backoff.adapters
        self._pins.check(self.adapters.values())
        assert self.loading == sum(a.tier is Tier.LOADING for a in self.placed.values())
        for adapter in self.adapters.values():
            assert 0 <= adapter.users <= adapter.claims
            assert adapter.users == 0 or adapter.tier is Tier.DEVICE, "rows run without weights"
        assert self.fresh == {a.digest: a for a in self.placed.values() if a.fresh}
        placed_bytes = sum(adapter.bytes for adapter in self.placed.values())
        assert self.extents.free == self.extents.capacity - placed_bytes
        if self.budget is not None:
            self.budget.check()

    def _touch(self, digest: str) -> None:
        self._changed.add(digest)
        self.touched.add(digest)

    def _not_fresh(self, adapter: Adapter) -> None:
        adapter.fresh = False
        self.fresh.pop(adapter.digest, None)

    def _dropped_from_host(self, digest: str) -> None:
        gone = self.adapters.get(digest)
        if gone is not None and gone.tier is Tier.HOST:
            gone.tier = Tier.DISK
            self._changed.add(digest)

    def _source_tier(self, digest: str) -> Tier:
        return Tier.HOST if digest in self.host else Tier.DISK

    def _slides(self, shifts: Iterable[Shift]) -> tuple[Slide, ...]:
        return tuple(Slide(self.slot(s.digest), s.source, s.target, s.bytes) for s in shifts)

    def _starve(self, adapter: Adapter, now_s: float) -> None:
        if adapter.wanted and adapter.tier is not Tier.DEVICE and adapter.starved_s is None:
            adapter.starved_s = now_s
            self.touched.add(adapter.digest)

    def _evict(self, adapter: Adapter, now_s: float) -> Evict:
        assert adapter.users == 0 and adapter.tier is Tier.DEVICE and not adapter.pinned
        self.wasted += adapter.fresh
        self._not_fresh(adapter)
        self.evictions += 1
        slot = self.slots.give_back(adapter)
        adapter.tier, adapter.since_s = self._source_tier(adapter.digest), now_s
        self._touch(adapter.digest)
        self._starve(adapter, now_s)
        return Evict(adapter.digest, slot)

    def _drop_if_unused(self, adapter: Adapter) -> list[Evict]:
        """Drop a forgotten adapter once nothing uses it."""
        if not adapter.leaving or adapter.claims or adapter.held or adapter.tier is Tier.LOADING:
            return []
        evictions = []
        if adapter.tier is Tier.DEVICE:
            evictions.append(self._evict(adapter, adapter.since_s))
            self.extents.give_back(adapter.digest)
        del self.adapters[adapter.digest]
        self._pins.remove(adapter)
        self.backoff.end(adapter.digest)
        if adapter.digest in self.host:
            self.host.drop(adapter.digest)
        self._touch(adapter.digest)
        return evictions
