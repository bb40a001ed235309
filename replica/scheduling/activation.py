"""Activated LoRA: an adapter that changes only the tokens from its last invocation on (Greenewald
et al., Activated LoRA, 2025).

    prompt  | … conversation … | invocation | question |  output
            | base model       | adapter …

The tokens before it are the base model's, so their pages are shared with it in both directions
(`Fork` in `pages.py`). In a prompt without the invocation, all of it and its output are the base
model's, as in PEFT.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace

from replica.scheduling.request import NewRequest


class Activations:
    """The invocations of the registered adapters that have one, by digest."""

    def __init__(self) -> None:
        self._invocations: dict[str, tuple[int, ...]] = {}

    def register(self, digest: str, invocation: tuple[int, ...]) -> None:
        if invocation:
            self._invocations[digest] = invocation

    def forget(self, digest: str) -> None:
        self._invocations.pop(digest, None)

    def resolved(self, new: NewRequest) -> tuple[NewRequest, int]:
        """The request, of the base model if nothing invokes its adapter; and how many tokens of its
        prompt are the base model's.
        """
        invocation = self._invocations.get(new.digest or "")
        if invocation is None:
            return new, 0
        start = _last(new.prompt, invocation)
        return (replace(new, digest=None), 0) if start is None else (new, start)


def _last(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` last begins in `tokens`. In bytes, because prompts are long."""
    text, pattern = array("q", tokens), array("q", wanted)
    data, part, end = text.tobytes(), pattern.tobytes(), None
    while (at := data.rfind(part, 0, end)) >= 0:
        start, between = divmod(at, text.itemsize)
        if not between:
            return start
        end = at + len(part) - 1
    return None
