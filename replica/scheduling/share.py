"""Fair share of the batch between adapters: virtual token counters.

Each adapter's counter grows with the tokens it is served, divided by its weight; the one with the
least goes first. One that was away comes back at the level of the least busy one present, so that
it cannot save up; where nobody is, at that of the last one who was, so that what that one was
served alone is not held against it (Sheng et al., Fairness in Serving Large Language Models, OSDI
2024).
"""

import math
from collections.abc import Mapping

# A generated token holds its row for a whole step; a prompt token shares one with many.
_OUTPUT_WEIGHT = 2.0


class Share:
    """weights: by digest, 1 where none is given. Off, every adapter's share is the same."""

    def __init__(self, weights: Mapping[str | None, float] | None = None, on: bool = False) -> None:
        self.on = on
        self._weights = dict(weights or {})
        self._leaving: set[str | None] = set()
        self._had: dict[str | None, float] = {}
        self._present: dict[str | None, int] = {}
        self._last = 0.0  # what the last one that was present had when it left

    def weigh(self, adapter_key: str, weight: float) -> None:
        """From now on what it is served counts a `weight`th."""
        assert 0 < weight < math.inf
        self._weights[adapter_key] = weight
        self._leaving.discard(adapter_key)

    def forget(self, adapter_key: str) -> None:
        """It is no longer registered; what is known of it goes with its last request."""
        self._leaving.add(adapter_key)
        self._leave(adapter_key)

    def of(self, adapter_key: str | None) -> float:
        return self._had.get(adapter_key, 0.0) if self.on else 0.0

    def enter(self, adapter_key: str | None) -> None:
        """A request of it was accepted."""
        if not self.on:
            return
        if adapter_key not in self._present:
            least = min((self._had[other] for other in self._present), default=self._last)
            self._had[adapter_key] = max(self._had.get(adapter_key, 0.0), least)
        self._present[adapter_key] = self._present.get(adapter_key, 0) + 1

    def leave(self, adapter_key: str | None) -> None:
        if not self.on:
            return
        self._present[adapter_key] -= 1
        if not self._present[adapter_key]:
            del self._present[adapter_key]
            self._last = self._had[adapter_key]
            self._leave(adapter_key)

    def _leave(self, adapter_key: str | None) -> None:
        if adapter_key in self._leaving and adapter_key not in self._present:
            self._leaving.discard(adapter_key)
            self._weights.pop(adapter_key, None)
            self._had.pop(adapter_key, None)

    def served(self, adapter_key: str | None, tokens: int, sampled: bool) -> None:
        """tokens: computed in one step. sampled: one of them is the model's own."""
        if self.on:
            cost = tokens + (_OUTPUT_WEIGHT if sampled else 0.0)
            self._had[adapter_key] = self._had.get(adapter_key, 0.0) + cost / self._weights.get(
                adapter_key, 1.0
            )
