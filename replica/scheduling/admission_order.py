"""Which requests may be admitted next, and in which order."""

from collections.abc import Callable, Collection, Iterable, Iterator

from cluster.values import Tier
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.drainer import Drainer
from replica.scheduling.loads import Switches
from replica.scheduling.request import Request
from replica.scheduling.running_set import RunningSet
from replica.scheduling.share import Share
from replica.scheduling.waiting import Waiting


class AdmissionOrder:
    """Reads the queue. Changes nothing."""

    def __init__(
        self,
        switches: Switches,
        adapter_cache: AdapterCache,
        waiting: Waiting,
        running_set: RunningSet,
        drainer: Drainer,
        share: Share,
    ) -> None:
        self._switches = switches
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._running_set = running_set
        self._drainer = drainer
        self._share = share

    def blocking_adapter(self, closed: Collection[str]) -> str | None:
        """The adapter of the first request, if `on_miss` lets that one block the rest.

        closed: adapters that take no new rows.
        """
        if self._switches.skip:
            return None
        admitted = (
            request.adapter_key
            for request in self._in_order()
            if request.adapter_key not in closed and self._drainer.may_admit(request)
        )
        return next(admitted, None)

    def scan(self, alone: Callable[[], bool]) -> Iterator[Request]:
        """Requests to try, until pages run out; then those that hold pages already.

        alone: true while nothing runs. The caller may admit each request before it asks for the
        next one.
        """
        for request in self._in_order():
            if self._switches.overlap and not alone() and self._running_set.lacks_pages(request):
                break
            yield request
        else:
            return
        if self._switches.skip:
            yield from self._waiting.ordered(self._running_set.has_pages(), self._share.of)

    def _in_order(self) -> Iterable[Request]:
        adapter_keys = None
        if self._switches.overlap and self._switches.skip:
            placed = self._adapter_cache.placed.values()
            adapter_keys = [None, *(a.digest for a in placed if a.tier is Tier.DEVICE)]
        share = self._share.of if self._switches.skip else _equal_share
        return self._waiting.in_order(adapter_keys, share)


def _equal_share(_: str | None) -> float:
    return 0.0
