"""Which adapter to give up first."""

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """An adapter that may leave the device. A tuple, for a search makes one of each that is idle.

    wanted: a request waits for it. placed_s: since when it is there. used_s: when a row last ran.
    value: expected uses a second × seconds to load it again ÷ bytes (greedy-dual, Cao and Irani
    1997, with a decayed frequency in place of its clock).
    """

    digest: str
    bytes: int
    placed_s: float
    used_s: float
    wanted: bool
    value: float


Order = Callable[[Iterable[Candidate]], list[Candidate]]


def lru(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Least recently used first, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.used_s, c.digest))


def fifo(candidates: Iterable[Candidate]) -> list[Candidate]:
    """First in, first out, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.placed_s, c.digest))


def cost(candidates: Iterable[Candidate]) -> list[Candidate]:
    """What is cheapest to lose first, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.value, c.used_s, c.digest))


ORDERS: dict[str, Order] = {"lru": lru, "fifo": fifo, "cost": cost}
