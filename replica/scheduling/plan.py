"""What one step does: changes to adapter memory, then rows, as one batch."""

from dataclasses import dataclass
from typing import NamedTuple

from replica.scheduling.adapter import ArenaChange
from replica.scheduling.request import Delta, Request


class Work(NamedTuple):
    """Compute tokens [start, end) of one request. sample: also choose the next token.

    A tuple for speed: one is made for each row and step.
    """

    request: Request
    start: int
    end: int
    slot: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Carried out in this order: arena_changes, then rows as one batch.

    number: of the step.
    failed: last deltas of requests whose adapter failed to load.
    waits: the plan reuses memory that the step in flight references, so it is carried out after
        that step has committed.
    wake_s: if there are no rows, when the next step may find some.
    """

    number: int
    arena_changes: tuple[ArenaChange, ...]
    rows: tuple[Work, ...]
    failed: tuple[Delta, ...]
    waits: bool = False
    wake_s: float | None = None
