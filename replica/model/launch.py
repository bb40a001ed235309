"""The inputs and results of one launch on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from replica.scheduling.request import PromptResult, Sampled, Sampling


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row tells of its prompt.

    following: `following[i]` is the token after the row's i-th; its log-probability is told, and
    those of the `top` likeliest tokens there. embeds: the state of the row's last token is told.
    """

    following: Sequence[int]
    top: int = 0
    embeds: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of one step.

    tokens: one for a decode row, several for a prefill chunk.
    position: of tokens[0]. `pages` have all tokens before it, and space for `tokens`.
    slot: 0 is the base model. base_until: tokens before this position are the base model's anyway.
    sampling: None if no token is sampled, because the chunk does not end the prompt.
    generated: tokens generated so far.
    carry: index of the row in the previous launch whose sampled token replaces tokens[0].
    past: if the sampling looks back, the prompt and the output before the token that it samples,
    without the one that `carry` brings. mask: which tokens its grammar allows (`grammars.py`).
    asked: None if it tells nothing of its prompt.
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    slot: int
    sampling: Sampling | None
    seed: int
    generated: int
    carry: int | None = None
    past: tuple[Sequence[int], Sequence[int]] | None = None
    mask: NDArray[np.int32] | None = None
    base_until: int = 0
    asked: Asked | None = None


def slots_of(rows: Sequence[Row]) -> list[int]:
    """One a token."""
    slots: list[int] = []
    for row in rows:
        plain = min(max(row.base_until - row.position, 0), len(row.tokens))
        slots += [0] * plain + [row.slot] * (len(row.tokens) - plain)
    return slots


class Executor(Protocol):
    """Computes batches, one after the other."""

    def launch(self, rows: Sequence[Row]) -> "Ticket": ...


class Ticket(Protocol):
    """A batch that was launched."""

    def results(self) -> list[Sampled | None]:
        """Waits for the tokens. One entry per row; None for a row that does not sample."""
        ...

    def prompts(self) -> dict[int, PromptResult]:
        """What rows tell of their prompts, by their index. Call it after `results`."""
        ...
