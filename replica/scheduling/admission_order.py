"""Which requests may be admitted next, and in which order."""

from collections.abc import Collection, Iterable, Iterator

from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.drainer import Drainer
from replica.scheduling.in_flight import InFlight
from replica.scheduling.loads import Switches
from replica.scheduling.prefill_groups import is_held
from replica.scheduling.request import Phase, Request
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
        in_flight: InFlight,
        drainer: Drainer,
        share: Share,
    ) -> None:
        self._switches = switches
        self._adapter_cache = adapter_cache
        self._waiting = waiting
        self._running_set = running_set
        self._in_flight = in_flight
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

    def candidates(self, closed: Collection[str], hold: bool) -> Iterator[Request]:
        """Requests to admit next, in order. The caller may admit each before it asks for the next.

        closed: adapters that take no new rows. hold: prompts of newly loaded adapters wait (see
        `prefill_groups.py`).
        """
        running_set = self._running_set
        if running_set.full:
            return
        for request in self._scan():
            if request.adapter_key in closed or not self._drainer.may_admit(request):
                continue
            if self._in_flight.references(request):
                continue  # it just left the batch, and that step may end it
            if hold and is_held(request, self._adapter_cache):
                continue
            yield request
            admitted = request.phase is Phase.RUNNING
            if running_set.full or not (admitted or self._switches.skip):
                return

    def _scan(self) -> Iterator[Request]:
        """Requests to try, until pages run out; then those that hold pages already."""
        running_set, overlap = self._running_set, self._switches.overlap
        for request in self._in_order():
            if overlap and not running_set.nothing_runs and running_set.lacks_pages(request):
                break
            yield request
        else:
            return
        if self._switches.skip:
            yield from self._waiting.ordered(self._running_set.has_pages(), self._share.of)

    def _in_order(self) -> Iterable[Request]:
        adapter_keys = None
        if self._switches.overlap and self._switches.skip:
            adapter_keys = [None, *[a.digest for a in self._adapter_cache.slots.on_device()]]
        share = self._share.of if self._switches.skip and self._share.on else None
        return self._waiting.in_order(adapter_keys, share)
