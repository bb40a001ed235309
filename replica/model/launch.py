"""The inputs and results of one launch on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from replica.scheduling.request import Sampled, Sampling


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of one step.

    tokens: one for a decode row, several for a prefill chunk.
    position: of tokens[0]. `pages` have all tokens before it, and space for `tokens`.
    slot: 0 is the base model.
    sampling: None if no token is sampled, because the chunk does not end the prompt.
    generated: tokens generated so far.
    carry: index of the row in the previous launch whose sampled token replaces tokens[0].
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    slot: int
    sampling: Sampling | None
    seed: int
    generated: int
    carry: int | None = None


class Executor(Protocol):
    """Computes batches, one after the other."""

    def launch(self, rows: Sequence[Row]) -> "Ticket": ...


class Ticket(Protocol):
    """A batch that was launched."""

    def results(self) -> list[Sampled | None]:
        """Waits for the tokens. One entry per row; None for a row that does not sample."""
        ...
