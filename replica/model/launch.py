"""What one launch on the device is given, and what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from replica.scheduling.request import Sampled, Sampling


@dataclass(frozen=True, slots=True)
class Row:
    """One request's share of one step.

    tokens: one to decode, a chunk to prefill. position: of tokens[0]; everything before it lies in
    `pages`, which also have room for `tokens`. slot: 0 is the base model. sampling: None when no
    token is wanted, for the chunk does not end the prompt. generated: tokens generated so far.
    carry: tokens[0] is whatever that row of the previous launch samples, and 0 here.
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
        """A token where one is wanted, in the order of the rows; waits for them."""
        ...
