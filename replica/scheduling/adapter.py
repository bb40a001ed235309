"""One adapter on one device, and the commands that load it, evict it or move its image."""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cluster.values import Tier

_HALF_LIFE_S = 60.0


@dataclass(slots=True)
class Adapter:
    """One registered version.

    path: directory of its files.
    claims: its requests that have not ended.
    users: its running rows.
    held: its requests that have ended while a step in flight still names them.
    since_s: when `tier` last changed.
    used_s: when a row last started or stopped running with it.
    fresh: loaded, and no row has run with it since.
    slice_s: when the first row ran after the load; its slice starts then.
    starved_s: since when requests have waited for it while it was off the device.
    heat: log2 of its uses per second, decayed, plus a term equal for all adapters (see `use`).
    leaving: forgotten; it is dropped when its last request ends.
    given_up: the pause before the next retry of its load is the longest.
    """

    digest: str
    path: str
    bytes: int
    pinned: bool
    since_s: float
    tier: Tier = Tier.DISK
    slot: int | None = None
    claims: int = 0
    users: int = 0
    held: int = 0
    used_s: float = 0.0
    fresh: bool = False
    slice_s: float = 0.0
    starved_s: float | None = None
    heat: float = -math.inf
    leaving: bool = False
    failures: int = 0
    retry_s: float = 0.0
    given_up: bool = False
    reason: str | None = None

    @property
    def wanted(self) -> bool:
        """True if a request waits for it."""
        return self.claims > self.users

    def use(self, now_s: float) -> None:
        """Count a use. Its weight halves every `_HALF_LIFE_S`.

        Instead of the old uses halving, each later one weighs more: heat = log2 Σ 2^(time /
        half-life). The ratio of two adapters is the same, and `heat` needs no decay when they are
        compared.
        """
        use = now_s / _HALF_LIFE_S
        low, high = sorted((self.heat, use))
        self.heat = high + math.log2(1.0 + math.exp2(low - high))


@dataclass(frozen=True, slots=True)
class Load:
    """Copy the image of `digest` from `source` to byte `offset` of the arena, as `slot`."""

    digest: str
    path: str
    slot: int
    offset: int
    bytes: int
    source: Tier


@dataclass(frozen=True, slots=True)
class Evict:
    digest: str
    slot: int


@dataclass(frozen=True, slots=True)
class Slide:
    """Move the image of `slot` down from byte `source` to byte `target`.

    `slot` is the one at planning time: a later change of the same plan may evict the adapter.
    """

    slot: int
    source: int
    target: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PageMove:
    """Copy the whole KV page `source` to `target`, a page with no holder."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ArenaChange:
    """Changes to adapter memory, in this order: evictions, slides, page_moves, load.

    page_moves: KV pages moved out of the bytes that the arena grows into.
    load: None if adapters give memory up for KV pages.
    """

    evictions: tuple[Evict, ...]
    slides: tuple[Slide, ...]
    load: Load | None
    page_moves: tuple[PageMove, ...] = ()


class Pins:
    """Which adapters are pinned, and how large the others are.

    With it a registration takes no longer with ten thousand adapters than with ten: they have few
    different sizes.
    """

    def __init__(self) -> None:
        self.pinned: dict[str, Adapter] = {}
        self._sizes: Counter[int] = Counter()  # of unpinned adapters

    def add(self, adapter: Adapter) -> None:
        """It is new."""
        assert not adapter.pinned
        self._sizes[adapter.bytes] += 1

    def pin(self, adapter: Adapter, pinned: bool) -> None:
        self.remove(adapter)
        adapter.pinned = pinned
        if pinned:
            self.pinned[adapter.digest] = adapter
        else:
            self._sizes[adapter.bytes] += 1

    def remove(self, adapter: Adapter) -> None:
        """It is no longer known."""
        if adapter.pinned:
            del self.pinned[adapter.digest]
        else:
            self._sizes -= Counter([adapter.bytes])

    def others(self, own: Adapter | None) -> list[tuple[int, bool]]:
        """(bytes, pinned) of the adapters besides `own`; of unpinned ones, one of each size."""
        pinned = [(a.bytes, True) for a in self.pinned.values() if a is not own]
        sizes = self._sizes
        if own is not None and not own.pinned:
            sizes = sizes - Counter([own.bytes])
        return pinned + [(size, False) for size in sizes]

    def check(self, adapters: Collection[Adapter]) -> None:
        assert self.pinned == {a.digest: a for a in adapters if a.pinned}
        assert self._sizes == Counter(a.bytes for a in adapters if not a.pinned)


def no_room(
    size: int, pinned: bool, others: Iterable[tuple[int, bool]], capacity: int, slots: int
) -> str | None:
    """Why the image cannot be served beside `others`, as a noun phrase; None if it can.

    others: (bytes, pinned) of each other image.

    Pinned images together must leave room for the largest unpinned one.
    """
    images = [*others, (size, pinned)]
    pinned_bytes = [bytes for bytes, pin in images if pin]
    largest = max((bytes for bytes, pin in images if not pin), default=0)
    if sum(pinned_bytes) + largest > capacity:
        return (
            f"an image of {size} bytes; there are {capacity} for adapters, of which pinned "
            f"adapters take {sum(pinned_bytes)} and the largest other one {largest}"
        )
    if len(pinned_bytes) + bool(largest) > slots:
        return f"no place: {len(pinned_bytes)} adapters are pinned and there are {slots} places"
    return None
