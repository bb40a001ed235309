"""One adapter on one device, and what is to be done to bring it there or let it go."""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.values import Tier


@dataclass(slots=True)
class Adapter:
    """One registered version. path: the directory of its files.

    claims: its requests that have not ended. users: those of them that run. held: its requests
    that have ended while a step in flight names them.
    fresh: loaded, but no row has run with it since. slice_s: when its first row ran since.
    starved_s: since when a request waits while it is not on the device.
    frequency: uses a second, decayed (see `_use`).
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
    frequency: float = 0.0
    leaving: bool = False
    failures: int = 0
    retry_s: float = 0.0
    reason: str | None = None

    @property
    def wanted(self) -> bool:
        """A request waits for it."""
        return self.claims > self.users


@dataclass(frozen=True, slots=True)
class Load:
    """Copy the image of `digest` from `source` to byte `offset` of the arena; it will be `slot`."""

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
    """Slide the image of `slot` from byte `source` down to byte `target`.

    The slot is that of the time of planning: a later room of the same plan may evict the adapter.
    """

    slot: int
    source: int
    target: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PageMove:
    """Copy the whole KV page `source` to `target`, which nobody holds before that."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ArenaChange:
    """What makes place for one load: evictions, then slides, then page_moves, then the load.

    page_moves: pages that lay where the arena grows. load: None where adapters make room for pages.
    """

    evictions: tuple[Evict, ...]
    slides: tuple[Slide, ...]
    load: Load | None
    page_moves: tuple[PageMove, ...] = ()


def no_room(
    size: int, pinned: bool, others: Iterable[tuple[int, bool]], capacity: int, slots: int
) -> str | None:
    """Why an image can never be served beside `others` (bytes, pinned), in words; None if it can.

    Pinned images together must leave room for the largest of the others.
    """
    images = [*others, (size, pinned)]
    kept = [bytes for bytes, pin in images if pin]
    largest = max((bytes for bytes, pin in images if not pin), default=0)
    if sum(kept) + largest > capacity:
        return (
            f"an image of {size} bytes; there are {capacity} for adapters, of which pinned "
            f"adapters take {sum(kept)} and the largest other one {largest}"
        )
    if len(kept) + bool(largest) > slots:
        return f"{len(kept)} pinned adapters; there are {slots} places"
    return None
