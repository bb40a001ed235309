"""One adapter on one device, and the commands that load it, evict it or move its image."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.values import Tier


@dataclass(slots=True)
class Adapter:
    """One registered version.

    paths: directories of its files, those registered last first.
    claims: its requests that have not ended.
    users: its running rows.
    held: its requests that have ended while a step in flight still names them.
    since_s: when `tier` last changed.
    used_s: when a row last started or stopped running with it.
    fresh: loaded, and no row has run with it since.
    slice_s: when the first row ran after the load; its slice starts then.
    starved_s: since when requests have waited for it while it was off the device.
    heat: log2 of its uses per second, decayed, plus a term equal for all adapters (see
        `adapter_cache._use`).
    leaving: forgotten; it is dropped when its last request ends.
    given_up: the pause before the next retry of its load is the longest.
    """

    digest: str
    paths: list[str]
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
    def path(self) -> str:
        """The directory for the next load: another one after each that failed."""
        return self.paths[self.failures % len(self.paths)]

    @property
    def wanted(self) -> bool:
        """True if a request waits for it."""
        return self.claims > self.users


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
