"""Who waits to run, in order of arrival, told apart by adapter so that none hides another."""

import heapq
from collections.abc import Callable, Iterator

from replica.request import Request


class Waiting:
    """Requests by (arrival number), grouped by digest. A returning request keeps its number."""

    def __init__(self) -> None:
        self._groups: dict[str | None, dict[str, tuple[int, Request]]] = {}
        self._numbers: dict[str, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    def __iter__(self) -> Iterator[Request]:
        for group in self._groups.values():
            for _, request in group.values():
                yield request

    def add(self, request: Request) -> None:
        number = self._numbers.setdefault(request.id, self._next)
        self._next = max(self._next, number + 1)
        group = self._groups.setdefault(request.digest, {})
        returns = bool(group) and number < next(reversed(group.values()))[0]
        group[request.id] = (number, request)
        if returns:
            ordered = sorted(group.items(), key=lambda item: item[1][0])
            self._groups[request.digest] = dict(ordered)

    def remove(self, request: Request) -> None:
        group = self._groups[request.digest]
        del group[request.id]
        if not group:
            del self._groups[request.digest]

    def forget(self, request: Request) -> None:
        """It has ended and will not return."""
        del self._numbers[request.id]

    def digests(self) -> list[str]:
        """Adapters that are waited for, the one of the oldest request first."""
        heads = [(next(iter(group.values()))[0], digest) for digest, group in self._groups.items()]
        return [digest for _, digest in sorted(heads, key=lambda h: h[0]) if digest is not None]

    def group(self, digest: str | None) -> list[Request]:
        return [request for _, request in self._groups.get(digest, {}).values()]

    def runnable(self, usable: Callable[[str], bool]) -> Iterator[Request]:
        """Base requests and those whose adapter is usable, oldest first.

        The caller may remove a request it was given while it goes on.
        """
        groups = [
            list(group.values())
            for digest, group in self._groups.items()
            if digest is None or usable(digest)
        ]
        for _, request in heapq.merge(*groups, key=lambda pair: pair[0]):
            yield request
