"""Which adapter to give up first."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may leave the device. wanted: a request waits for it."""

    digest: str
    bytes: int
    used_s: float
    wanted: bool


def lru(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Least recently used first, but those nobody waits for before all others."""
    return sorted(candidates, key=lambda c: (c.wanted, c.used_s, c.digest))
