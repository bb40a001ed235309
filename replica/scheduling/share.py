"""Fair share of the batch among adapters, by virtual token counters.

Each adapter's counter grows with the tokens served to it, divided by its weight. The adapter with
the lowest counter goes first. An adapter that returns starts no lower than the lowest counter
present, so that it cannot save up. If none is present, it starts no lower than the counter of the
one that left last, so that tokens served to that one alone do not count against it (Sheng et al.,
Fairness in Serving Large Language Models, OSDI 2024).
"""

import math
from collections.abc import Mapping

# A generated token takes its row a whole step; many prompt tokens share one.
_OUTPUT_WEIGHT = 2.0


class Share:
    """weights: by digest; 1 by default. If not `on`, every adapter's share is the same."""

    def __init__(self, weights: Mapping[str | None, float] | None = None, on: bool = False) -> None:
        self.on = on
        self._weights = dict(weights or {})
        self._leaving: set[str | None] = set()
        self._counters: dict[str | None, float] = {}
        self._present: dict[str | None, int] = {}
        self._last = 0.0  # counter of the adapter that left last

    def weigh(self, adapter_key: str, weight: float) -> None:
        """From now on tokens served to the adapter count 1 ÷ `weight`."""
        assert 0 < weight < math.inf
        self._weights[adapter_key] = weight
        self._leaving.discard(adapter_key)

    def forget(self, adapter_key: str) -> None:
        """The adapter is no longer registered. Its counter and weight go with its last request."""
        self._leaving.add(adapter_key)
        self._drop_if_gone(adapter_key)

    def of(self, adapter_key: str | None) -> float:
        return self._counters.get(adapter_key, 0.0) if self.on else 0.0

    def enter(self, adapter_key: str | None) -> None:
        """A request for it was accepted."""
        if not self.on:
            return
        if adapter_key not in self._present:
            least = min((self._counters[other] for other in self._present), default=self._last)
            self._counters[adapter_key] = max(self._counters.get(adapter_key, 0.0), least)
        self._present[adapter_key] = self._present.get(adapter_key, 0) + 1

    def leave(self, adapter_key: str | None) -> None:
        if not self.on:
            return
        self._present[adapter_key] -= 1
        if not self._present[adapter_key]:
            del self._present[adapter_key]
            self._last = self._counters[adapter_key]
            self._drop_if_gone(adapter_key)

    def _drop_if_gone(self, adapter_key: str | None) -> None:
        if adapter_key in self._leaving and adapter_key not in self._present:
            self._leaving.discard(adapter_key)
            self._weights.pop(adapter_key, None)
            self._counters.pop(adapter_key, None)

    def served(self, adapter_key: str | None, tokens: int, sampled: bool) -> None:
        """tokens: computed in one step. sampled: the step also chose a token."""
        if self.on:
            cost = tokens + (_OUTPUT_WEIGHT if sampled else 0.0)
            before = self._counters.get(adapter_key, 0.0)
            self._counters[adapter_key] = before + cost / self._weights.get(adapter_key, 1.0)
