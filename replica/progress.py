"""How much of what was computed had to be: tokens whose pages were given up are computed again."""

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """In tokens. needed: computed for the first time. again: computed once more."""

    needed: int = 0
    again: int = 0

    @property
    def over_needed(self) -> float:
        return (self.needed + self.again) / max(self.needed, 1)
