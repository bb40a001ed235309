"""Requests that wait to run, grouped by adapter so that none hides another.

Within an adapter lower `priority` goes first, as in vLLM, then earlier arrival. A request that
returns (parked or preempted) keeps its number, and so its position.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator

from replica.scheduling.request import Request

Key = tuple[int, int]


class Waiting:
    """Requests by `adapter_key`; None is the base model.

    prompt_tokens, tokens_max: sums over all requests.
    """

    def __init__(self) -> None:
        self._groups: dict[str | None, list[tuple[Key, Request]]] = {}
        self._keys: dict[str, Key] = {}
        self.prompt_tokens = self.tokens_max = 0
        self._count = 0
        self._priorities: dict[int, int] = {}
        self._begun: dict[str | None, int] = {}  # requests that have a token
        self.touched: set[str] = set()  # adapters whose requests changed; for `ServiceOrder`
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
            key = self._keys[request.id] = (request.priority, self._next)
            self._next += 1
        insort(self._groups.setdefault(request.adapter_key, []), (key, request), key=lambda e: e[0])
        self._count_in(request, 1)

    def remove(self, request: Request) -> None:
        group = self._groups[request.adapter_key]
        index = bisect_left(group, self._keys[request.id], key=lambda e: e[0])
        assert group[index][1] is request
        del group[index]
        if not group:
            del self._groups[request.adapter_key]
        self._count_in(request, -1)

    def touch(self, request: Request) -> None:
        """A waiting request got a token, from a step in flight when it left the batch."""
        if request.adapter_key is not None:
            self.touched.add(request.adapter_key)

    def _count_in(self, request: Request, change: int) -> None:
        self._count += change
        self.prompt_tokens += change * len(request.prompt)
        self.tokens_max += change * request.tokens_max
        self._priorities[request.priority] = self._priorities.get(request.priority, 0) + change
        if not self._priorities[request.priority]:
            del self._priorities[request.priority]
        adapter_key = request.adapter_key
        if request.begun:
            self._begun[adapter_key] = self._begun.get(adapter_key, 0) + change
            if not self._begun[adapter_key]:
                del self._begun[adapter_key]
        if adapter_key is not None:
            self.touched.add(adapter_key)

    def forget(self, request: Request) -> None:
        """It has ended and will not return."""
        del self._keys[request.id]

    def key(self, request: Request) -> Key:
        return self._keys[request.id]

    def head(self, adapter_key: str | None) -> Request:
        return self._groups[adapter_key][0][1]

    @property
    def most_urgent(self) -> float:
        """The lowest priority of all requests; infinity if there are none."""
        return min(self._priorities, default=math.inf)

    def adapter_keys(self) -> list[str]:
        """Adapters that requests wait for, in no particular order."""
        return [adapter_key for adapter_key in self._groups if adapter_key is not None]

    def all_begun(self, adapter_key: str | None) -> bool:
        """True if each of its requests has a token."""
        return self._begun.get(adapter_key, 0) == len(self._groups[adapter_key])

    def waited_for(self, adapter_key: str | None) -> bool:
        return adapter_key in self._groups

    def group(self, adapter_key: str | None) -> list[Request]:
        return [request for _, request in self._groups.get(adapter_key, ())]

    def ordered(
        self, requests: Iterable[Request], share: Callable[[str | None], float]
    ) -> list[Request]:
        """The requests in the order of `in_order`."""

        def key(request: Request) -> tuple[int, float, int]:
            priority, number = self._keys[request.id]
            return priority, share(request.adapter_key), number

        return sorted(requests, key=key)

    def in_order(
        self,
        adapter_keys: Iterable[str | None] | None,
        share: Callable[[str | None], float] | None,
    ) -> Iterator[Request]:
        """The requests of these adapters by priority, then share, then arrival.

        adapter_keys: None for all. share: counter of an adapter; lower goes first. None: all are
        equal.

        The caller may remove a request that it was given before it asks for the next one.
        """
        groups = self._groups
        keys = groups if adapter_keys is None else filter(groups.__contains__, adapter_keys)
        heap = []
        for adapter_key in keys:
            group = groups[adapter_key]
            priority, number = group[0][0]
            counter = share(adapter_key) if share else 0.0
            heap.append((priority, counter, number, 0, adapter_key, group))
        heapq.heapify(heap)
        while heap:
            _, _, _, position, adapter_key, group = heapq.heappop(heap)
            request = group[position][1]
            yield request
            if position < len(group) and group[position][1] is request:
                position += 1  # the caller did not remove it
            if position < len(group):
                priority, number = group[position][0]
                counter = share(adapter_key) if share else 0.0
                heapq.heappush(heap, (priority, counter, number, position, adapter_key, group))
