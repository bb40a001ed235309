"""Who waits to run, told apart by adapter so that none hides another.

Within an adapter the higher priority goes first, then the earlier arrival; a request that comes
back (parked or preempted) keeps its number and so stands before those that came after it.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from replica.request import Request

Key = tuple[int, int]


class Waiting:
    """Requests by adapter; `None` is the base model."""

    def __init__(self) -> None:
        self._groups: dict[str | None, list[tuple[Key, Request]]] = {}
        self._keys: dict[str, Key] = {}
        self._count = 0
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for group in self._groups.values():
            for _, request in group:
                yield request

    def add(self, request: Request) -> None:
        key = self._keys.get(request.id)
        if key is None:
            key = self._keys[request.id] = (-request.priority, self._next)
            self._next += 1
        insort(self._groups.setdefault(request.place, []), (key, request), key=lambda e: e[0])
        self._count += 1

    def remove(self, request: Request) -> None:
        group = self._groups[request.place]
        index = bisect_left(group, self._keys[request.id], key=lambda e: e[0])
        assert group[index][1] is request
        del group[index]
        if not group:
            del self._groups[request.place]
        self._count -= 1

    def forget(self, request: Request) -> None:
        """It has ended and will not return."""
        del self._keys[request.id]

    def key(self, request: Request) -> Key:
        return self._keys[request.id]

    def head(self, place: str | None) -> Request:
        return self._groups[place][0][1]

    def places(self) -> list[str]:
        """Adapters that are waited for, in no particular order."""
        return [place for place in self._groups if place is not None]

    def group(self, place: str | None) -> list[Request]:
        return [request for _, request in self._groups.get(place, ())]

    def in_order(
        self, wanted: Callable[[str], bool], share: Callable[[str | None], float]
    ) -> Iterator[Request]:
        """Base requests and those of wanted adapters: by priority, then share, then arrival.

        share: what an adapter has had so far; less goes first. The caller may remove a request that
        it was given while it goes on.
        """
        groups = [
            (place, list(group))
            for place, group in self._groups.items()
            if place is None or wanted(place)
        ]
        heap = [
            (group[0][0][0], share(place), group[0][0][1], index, 0)
            for index, (place, group) in enumerate(groups)
        ]
        heapq.heapify(heap)
        while heap:
            _, _, _, index, position = heapq.heappop(heap)
            place, group = groups[index]
            yield group[position][1]
            if position + 1 < len(group):
                priority, number = group[position + 1][0]
                heapq.heappush(heap, (priority, share(place), number, index, position + 1))
