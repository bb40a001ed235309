"""Which requests are known to fit without an estimate of what the other rows will need."""

from replica.scheduling.request import Phase, Request
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import begin, new, run, scheduler


def waiting(core: Scheduler, tokens: int) -> Request:
    """A request that will hold this many tokens at its end."""
    return core.add(new("w", prompt=tokens - 4), 0.0)


def fits(core: Scheduler, request: Request, spare: int = 0) -> bool:
    return core.running_set.demand.fits_whole(request, spare)


def test_rows_count_with_the_pages_of_their_ends_and_two_for_rounding() -> None:
    core = scheduler(pages=16)
    begin(core, new("long", prompt=8, max_tokens=120))  # 8 pages at its end, and 1 now
    request = waiting(core, 16)
    assert fits(core, request, spare=3) and not fits(core, request, spare=4)
    core.cancel("long", 0.0)
    assert fits(core, request, spare=13) and not fits(core, request, spare=14)


def test_ended_requests_count_while_a_step_in_flight_uses_their_pages() -> None:
    core = scheduler(pages=8)
    core.add(new("a", prompt=60), 0.0)
    plan = core.step(0.0)
    core.cancel("a", 0.0)
    request = waiting(core, 32)
    core.check()
    assert fits(core, request) and not fits(core, request, spare=1), "4 of 8 pages are held"
    core.commit(plan, [None for _ in plan.rows], 0.0)
    assert fits(core, request, spare=4)


def test_nothing_is_known_to_fit_while_rows_are_parked() -> None:
    core = scheduler(sharing=Sharing(quantum_s=0.1), growth_outputs=2.0)
    begin(core, new("x", "a", max_tokens=60), new("y", "b", max_tokens=60))
    core.add(new("s", "c"), 0.0)
    for step in range(20):
        if core.running_set.parked:
            break
        run(core, 1.0 + step)
    (parked,) = core.running_set.parked.values()
    assert parked.phase is Phase.PARKED and core.pages.free > 32
    request = waiting(core, 16)
    assert not fits(core, request)
    core.cancel(parked.id, 30.0)
    assert fits(core, request)
