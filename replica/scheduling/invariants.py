"""What holds across a scheduler's parts between any two calls. Each part also checks itself."""

import math
from collections.abc import Mapping

from cluster.values import Tier
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.in_flight import InFlight
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.request import Phase, Request
from replica.scheduling.running_set import RunningSet
from replica.scheduling.waiting import Waiting


def check_requests(
    requests: Mapping[str, Request],
    waiting: Waiting,
    running_set: RunningSet,
    in_flight: InFlight,
    pages: Pages,
    page_copies: PageCopies,
    adapter_cache: AdapterCache,
) -> None:
    """Raises AssertionError. requests: those that have not ended, by id."""
    queued = {request.id for request in waiting}
    running, parked = set(running_set.running), set(running_set.parked)
    assert queued.isdisjoint(running)
    assert parked <= queued
    assert queued | running == set(requests), "a request was lost"
    assert len(queued) == len(waiting)
    assert waiting.prompt_tokens == sum(len(request.prompt) for request in waiting)
    assert waiting.tokens_max == sum(request.tokens_max for request in waiting)
    priorities = [request.priority for request in waiting]
    assert waiting.most_urgent == min(priorities, default=math.inf)
    for request in requests.values():
        phase = Phase.WAITING
        if request.id in running:
            phase = Phase.RUNNING
        elif request.id in parked:
            phase = Phase.PARKED
        assert request.phase is phase
        held = max(len(request.pages), len(request.host_pages))
        assert bool(held) == (phase is not Phase.WAITING)
        assert request.computed <= held * pages.page_tokens
        assert bool(request.pages and request.host_pages) == (request.copying is not None)
        assert request.pages or phase is not Phase.RUNNING, "a row runs without its pages"
        _check_closer_looks(request, pages.page_tokens)
    holders = [*requests.values(), *in_flight.deferred_free]
    pages.check(r.pages for r in holders)
    page_copies.check(holders)
    for digest, adapter in adapter_cache.adapters.items():
        own = [r for r in requests.values() if r.adapter_key == digest]
        assert adapter.claims == len(own)
        assert adapter.users == sum(r.id in running for r in own)
        assert adapter.held == sum(r.adapter_key == digest for r in in_flight.deferred_free)
        starves = adapter.wanted and adapter.tier is not Tier.DEVICE
        assert not starves or adapter.starved_s is not None


def _check_closer_looks(request: Request, page_tokens: int) -> None:
    """`decodes_until` and `quiet_until` spare none that is needed."""
    until, quiet = request.decodes_until, request.quiet_until
    assert request.phase is Phase.RUNNING or not (until or quiet)
    if until:
        assert request.copying is None and not request.stepwise
        assert len(request.prompt) < request.tokens == request.computed + 1
        assert until <= min(len(request.pages) * page_tokens, request.tokens_max - 1)
    if quiet:
        assert request.lost < len(request.prompt) + len(request.output)
        assert quiet < (request.published + 1) * page_tokens
        assert quiet <= request.tokens_max - 2
