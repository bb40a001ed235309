"""Finds stop strings and marks in text that arrives in pieces."""

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Finds stop strings in text that arrives in pieces.

    Text that may begin a stop string is held until later text decides it.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "an empty stop string matches any text"
        self._searches = [_Search(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that can be emitted. Sets `found` when a stop string ends the answer."""
        assert self.found is None, "text after the stop string"
        text = self._held + piece
        ends = [(search.push(piece), search.stop) for search in self._searches]
        hits = [
            (len(self._held) + end - len(stop), -len(stop), stop)
            for end, stop in ends
            if end is not None
        ]
        if hits:
            start, _, self.found = min(hits)
            self._held = ""
            return text[: start + len(self.found)] if self._include else text[:start]
        keep = max((search.begun for search in self._searches), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def release(self, piece: str) -> str:
        """The held text and `piece`, emitted without a search for stop strings."""
        held, self._held = self._held, ""
        for search in self._searches:
            search.begun = 0
        return held + piece


class _Search:
    """One stop string's, by Knuth, Morris and Pratt: a character costs O(1), whatever was held.

    begun: how many characters at the end of the text so far begin the stop string.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self._falls, self.begun = stop, _falls(stop), 0

    def push(self, piece: str) -> int | None:
        """Where in `piece` the stop string ends first; None if it does not."""
        stop, falls, begun = self.stop, self._falls, self.begun
        for at, character in enumerate(piece, 1):
            while begun and stop[begun] != character:
                begun = falls[begun]
            begun += stop[begun] == character
            if begun == len(stop):
                return at
        self.begun = begun
        return None


@lru_cache(maxsize=256)
def _falls(stop: str) -> tuple[int, ...]:
    """For each length of a beginning, the longest shorter beginning that ends it."""
    falls, begun = [0, 0], 0
    for character in stop[1:]:
        while begun and stop[begun] != character:
            begun = falls[begun]
        begun += stop[begun] == character
        falls.append(begun)
    return tuple(falls)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may begin `mark`."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:count]):
            return count
    return 0
