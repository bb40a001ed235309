"""Which rows of the batch decode in a step: all whose prompt is done, as far as they have pages."""

from replica.scheduling.in_flight import InFlight
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Work
from replica.scheduling.request import Phase, Request
from replica.scheduling.running_set import RunningSet


class Decode:
    """Plans the decode rows of each step."""

    def __init__(self, running_set: RunningSet, pages: Pages, in_flight: InFlight) -> None:
        self._running_set = running_set
        self._pages = pages
        self._in_flight = in_flight

    def rows(self, now_s: float) -> tuple[list[Work], list[Request]]:
        """Decode rows, oldest request first; and the requests whose prompt is in progress.

        This and `Scheduler.commit` run once a row and step, so they are written for speed.
        """
        decoding: list[Request] = []
        begun: list[Request] = []
        number, make = self._in_flight.number, tuple.__new__
        for request in list(self._running_set.running.values()):
            tokens = request.tokens
            if tokens > request.decodes_until and not self._may_decode(request, begun, now_s):
                continue
            decoding.append(request)
            request.computed, request.tokens, request.step = tokens, tokens + 1, number
        rows = [make(Work, (r, r.computed - 1, r.computed, r.slot, True)) for r in decoding]
        return rows, [request for request in begun if request.phase is Phase.RUNNING]

    def _may_decode(self, request: Request, begun: list[Request], now_s: float) -> bool:
        """begun: it is added if its prompt is in progress."""
        tokens = request.tokens
        if request.copying is not None:
            return False  # it has returned, but its pages have not yet
        if request.computed != tokens - 1 or tokens <= len(request.prompt):
            begun.append(request)
            return False
        if tokens >= request.tokens_max:
            return False  # the step in flight yields its last token
        if request.stepwise and tokens > len(request.prompt) + len(request.output):
            return False  # what may come next depends on the token in flight
        page_tokens = self._pages.page_tokens
        if tokens > len(request.pages) * page_tokens and (
            request.phase is not Phase.RUNNING or not self._running_set.grow(request, now_s)
        ):
            return False  # it lost its pages to an older row
        if not request.stepwise:
            until = len(request.pages) * page_tokens
            request.decodes_until = min(until, request.tokens_max - 1)
        return True
