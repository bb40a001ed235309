"""What one step is to do: rooms for adapters, then rows, as one batch."""

from dataclasses import dataclass
from typing import NamedTuple

from replica.scheduling.adapter import ArenaChange
from replica.scheduling.request import Delta, Request


class Work(NamedTuple):
    """Compute tokens [start, end) of one request; `sample`: and choose the token that follows.

    A tuple, for one is made for each row and step.
    """

    request: Request
    start: int
    end: int
    slot: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """To be carried out in this order: rooms (see there), then the rows as one batch.

    number: of the step. waits: it takes what the step in flight names, and is to be carried out
    when that one has committed. wake_s: when there are no rows, the time at which another step may
    find some.
    """

    number: int
    arena_changes: tuple[ArenaChange, ...]
    rows: tuple[Work, ...]
    failed: tuple[Delta, ...]
    waits: bool = False
    wake_s: float | None = None
