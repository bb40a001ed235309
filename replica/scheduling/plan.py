"""What one step does: changes to adapter memory, then rows, as one batch."""

from dataclasses import dataclass
from typing import NamedTuple

from replica.scheduling.adapter import ArenaChange
from replica.scheduling.pages import PageCopy
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
    """Carried out in this order: arena_changes, page_copies, then rows as one batch.

    number: of the step.
    page_copies: start in this order, after all steps before, and may end at any later time. If an
        arena change moves a page that an earlier plan copies, that copy ends first.
    failed: last deltas of requests whose adapter failed to load.
    waits: the plan reuses memory that the step in flight references, so it is carried out after
        that step has committed.
    wake_s: if there are no rows, when the next step may find some.
    """

    number: int
    arena_changes: tuple[ArenaChange, ...]
    rows: tuple[Work, ...]
    failed: tuple[Delta, ...]
    page_copies: tuple[PageCopy, ...] = ()
    waits: bool = False
    wake_s: float | None = None


def unplan(work: Work) -> None:
    """The newest plan will not carry out this row."""
    work.request.computed, work.request.step = work.start, 0
    work.request.tokens -= work.sample
