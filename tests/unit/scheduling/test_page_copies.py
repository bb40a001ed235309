"""Pages of rows off the batch move to host memory and back, and nothing is computed twice."""

import dataclasses
from collections.abc import Callable

import pytest

from replica.scheduling.loads import Switches
from replica.scheduling.pages import PageCopy, Pages
from replica.scheduling.plan import Plan
from replica.scheduling.request import Delta, NewRequest, Phase, Request, Sampled
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from replica.scheduling.turns import Sharing
from tests.core import STEP_S, begin, new, ran, run, scheduler, settle

Ran = tuple[Plan, list[Delta]]


def short(**settings: object) -> Scheduler:
    """Four pages. Two rows of one page each, which grow to three."""
    core = scheduler(**{"pages": 4, "context": 64, "host_pages": 8, **settings})  # type: ignore[arg-type]
    begin(core, *(new(name, prompt=10, max_tokens=30) for name in ("old", "young")))
    return core


def until_copy(core: Scheduler, step: Callable[..., Ran] = run) -> tuple[Plan, PageCopy]:
    """Steps until a row leaves or returns."""
    for _ in range(100):
        plan, _ = step(core, 1.0)
        if plan.page_copies:
            (copy,) = plan.page_copies
            return plan, copy
    raise AssertionError("nothing is copied")


def free(pages: Pages) -> set[int]:
    taken = pages.take(pages.free)
    assert taken is not None
    pages.give_back(taken)
    return set(taken)


def row(core: Scheduler, name: str) -> Request:
    return core._requests[name]


def end(core: Scheduler) -> None:
    """Runs all work to its end."""
    for step in range(400):
        if not core.has_work:
            break
        settle(core, step * STEP_S)
    assert not core.has_work
    host = core.page_copies.host
    assert core.pages.free == core.pages.capacity
    assert host is None or host.free == host.capacity


def test_the_newest_row_leaves_and_goes_on_where_it_was() -> None:
    core = short()
    plan, out = until_copy(core)
    young = row(core, "young")
    assert out.out and young.phase is Phase.PARKED and list(out.pages) == young.pages
    computed = young.computed
    core.pages_copied(out.number, 0.0)
    assert not young.pages and young.host_pages == list(out.host_pages)
    plan, back = until_copy(core)
    assert not back.out and set(back.host_pages) <= set(out.host_pages)
    assert young.phase is Phase.RUNNING
    core.pages_copied(back.number, 0.0)
    plan, _ = run(core)
    assert [(w.start, w.end) for w in plan.rows] == [(computed, computed + 1)]
    end(core)
    assert core.growth.over_needed == 1


def test_a_row_waits_for_its_page_until_the_copy_is_done_and_none_else_leaves() -> None:
    core = short()
    plan, out = until_copy(core)
    old = row(core, "old")
    assert ran(plan) == [] and old.phase is Phase.RUNNING
    for _ in range(3):
        plan, _ = run(core)
        assert not plan.rows and not plan.page_copies
    core.pages_copied(out.number, 0.0)
    assert ran(run(core)[0]) == ["old"]


def test_a_row_that_returned_is_not_computed_before_its_pages_are_back() -> None:
    core = short()
    _, out = until_copy(core)
    core.pages_copied(out.number, 0.0)
    _, back = until_copy(core)
    for _ in range(3):
        assert ran(run(core)[0]) == []
    core.pages_copied(back.number, 0.0)
    assert ran(run(core)[0]) == ["young"]


@pytest.mark.parametrize("moment", ["on its way out", "in host memory", "on its way back"])
def test_a_request_that_is_cancelled_keeps_its_pages_until_the_copy_is_done(moment: str) -> None:
    core = short()
    _, copy = until_copy(core)
    if moment != "on its way out":
        core.pages_copied(copy.number, 0.0)
    if moment == "on its way back":
        _, copy = until_copy(core)
    assert core.cancel("young", 0.0)
    core.check()
    host = core.page_copies.host
    assert host is not None
    if moment == "in host memory":
        assert host.free == host.capacity
    else:
        assert not set(copy.host_pages) & free(host)
        assert not set(copy.pages) & free(core.pages)
        core.pages_copied(copy.number, 0.0)
    end(core)


def test_pages_are_lost_if_host_memory_is_full() -> None:
    core = short(host_pages=1)
    for _ in range(30):
        plan, _ = run(core)
        assert not plan.page_copies
    assert core.timelines.counts[Event.PREEMPTED]
    end(core)
    assert core.growth.recomputed > 0


def test_a_copy_that_takes_longer_than_computing_is_not_made_but_tried_again_later() -> None:
    core = short(page_copy_s=0.5)
    page_s = core.costs.page_copy_s(1)
    for _ in range(30):
        plan, _ = run(core)
        assert not plan.page_copies
    assert core.timelines.counts[Event.PREEMPTED]
    assert 0 < core.costs.page_copy_s(1) < page_s


def test_without_host_pages_nothing_is_copied() -> None:
    core = short(host_pages=0)
    end(core)
    assert core.page_copies.out == 0 and core.growth.recomputed > 0


def parking(**settings: object) -> Scheduler:
    """`b` waits for the place of `a`, whose row may be parked."""
    given: dict[str, object] = {
        "slots": 1,
        "host_pages": 8,
        "sharing": Sharing(quantum_s=0.1, tpot_target_s=0.2),
    }
    core = scheduler(**{**given, **settings})  # type: ignore[arg-type]
    begin(core, new("a", "a", prompt=20, max_tokens=60))
    core.add(new("b", "b", prompt=20, max_tokens=60), 1.0)
    return core


def test_rows_are_parked_in_host_memory_if_the_device_may_keep_none() -> None:
    core = parking(parked_pages_max=0)
    plan, _ = settle(core, 1.0)
    (copy,) = plan.page_copies
    assert row(core, "a").phase is Phase.PARKED and copy.out
    end(core)
    assert core.growth.over_needed == 1


def test_rows_are_parked_on_the_device_if_there_is_space() -> None:
    core = parking()
    plan, _ = settle(core, 1.0)
    assert row(core, "a").phase is Phase.PARKED and not plan.page_copies
    end(core)


def test_parked_rows_leave_for_a_request_that_could_run() -> None:
    core = parking(pages=6, context=80)
    run(core, 1.0)
    core.add(new("busy", prompt=4, max_tokens=12), 1.0)
    run(core, 1.0)
    parked = row(core, "a")
    assert parked.phase is Phase.PARKED and len(parked.pages) == 2
    core.add(new("base", prompt=60, max_tokens=4), 1.0)
    plan, _ = run(core, 1.0)
    (copy,) = plan.page_copies
    assert list(copy.pages) == parked.pages
    core.pages_copied(copy.number, 0.0)
    assert "base" in ran(run(core, 1.0)[0])
    core.loaded("b", 1.0)
    end(core)
    assert core.growth.over_needed == 1


def test_pages_that_the_prefix_cache_has_are_not_copied_back() -> None:
    core = parking(parked_pages_max=0)
    plan, _ = settle(core, 1.0)
    (out,) = plan.page_copies
    a = row(core, "a")
    assert core.cancel("b", 1.0)
    _, back = until_copy(core, settle)
    assert a.pages[0] == out.pages[0], "the full first page was still on the device"
    assert back.host_pages == out.host_pages[1:]


def test_only_pages_with_computed_tokens_are_copied() -> None:
    core = scheduler(tokens=16, pages=5, context=80, host_pages=8)
    begin(core, new("old", prompt=15, max_tokens=20))
    core.add(new("young", prompt=60, max_tokens=2), 0.0)
    _, copy = until_copy(core)
    assert len(copy.pages) < 4
    core.pages_copied(copy.number, 0.0)
    end(core)
    assert core.growth.over_needed == 1


def test_a_row_returns_to_what_it_computed_though_others_computed_more_of_its_prompt() -> None:
    core = scheduler(tokens=16, pages=5, context=80, host_pages=8)
    begin(core, new("old", prompt=15, max_tokens=20))
    core.add(new("young", prompt=60, max_tokens=2), 0.0)
    until_copy(core, settle)
    core.add(new("nugoy", prompt=60, max_tokens=2, priority=-10), 0.0)  # the same prompt
    core.cancel("old", 0.0)
    while row(core, "young").phase is Phase.PARKED:
        settle(core, 0.0)
    young = row(core, "young")
    assert young.computed < 16 and young.published == 0, "it would write into cached pages"
    end(core)


def test_a_copy_out_waits_for_the_step_that_fills_the_pages() -> None:
    core = short()
    before = core.step(0.0)
    for _ in range(60):
        plan = core.step(0.0)
        core.check()
        if plan.page_copies:
            break
        core.commit(before, [Sampled(7) for _ in before.rows], 0.0)
        before = plan
    assert plan.waits and "young" in ran(before)
    core.commit(before, [Sampled(7) for _ in before.rows], 0.0)
    core.pages_copied(plan.page_copies[0].number, 0.0)
    assert (
        row(core, "young").computed
        == len(row(core, "young").prompt) + len(row(core, "young").output) - 1
    )


def test_new_requests_leave_pages_for_a_row_in_host_memory() -> None:
    """One page is free: too few for the row that left, enough for the new request."""
    core = short(pages=7)
    core.add(new("third", prompt=10, max_tokens=30), 0.0)
    _, out = until_copy(core)
    core.pages_copied(out.number, 0.0)
    assert core.pages.free
    core.add(new("late", prompt=4, max_tokens=4), 0.0)
    for _ in range(100):
        plan, _ = settle(core, 0.0)
        if row(core, "third").phase is not Phase.PARKED:
            break
        assert "late" not in ran(plan)
    else:
        raise AssertionError("it never returns")
    end(core)


def test_without_overlap_pages_return_after_the_load_which_may_fail() -> None:
    core = parking(parked_pages_max=0, switches=Switches(overlap=False))
    plan, _ = run(core, 1.0)
    (out,) = plan.page_copies
    core.pages_copied(out.number, 0.0)
    assert core.cancel("b", 1.0)
    plan, _ = run(core, 1.0)
    assert [c.load.digest for c in plan.arena_changes if c.load] == ["a"]
    assert not plan.page_copies and row(core, "a").phase is Phase.PARKED
    end(core)


def test_a_row_that_returned_runs_before_it_is_parked_again() -> None:
    """Its adapter's slice is over as soon as its pages are back."""
    core = parking(
        parked_pages_max=0, sharing=Sharing(quantum_s=1e-3), copy_bytes_per_s=4e5, page_copy_s=1e-6
    )
    end(core)
    assert core.timelines.counts[Event.PARKED] > 10 and core.growth.over_needed == 1


@pytest.mark.parametrize("waiting, suffice", [(15, True), (16, False)])
def test_turns_count_on_as_many_host_pages_as_the_device_has(waiting: int, suffice: bool) -> None:
    """Each request needs a page. The device has seven left of eight, the host any number."""
    core = scheduler(pages=8, context=64, host_pages=1000)
    begin(core, new("first", prompt=10, max_tokens=4))
    for i in range(waiting):
        core.add(new(f"late{i}", prompt=10, max_tokens=4), 0.0)
    core.running_set.begin_step((), lambda _: True)
    assert core.running_set.demand.met == suffice


def test_pages_that_parked_rows_hold_count_once() -> None:
    """The parked row's prompt and the newcomer's together have more tokens than free pages."""
    core = scheduler(pages=8)
    begin(core, new("parked", "a", prompt=64, max_tokens=16))
    newcomer = core.add(new("newcomer", "b", prompt=10), 0.0)
    assert core.running_set.park_all(("a",), newcomer, 0.0)
    core.running_set.begin_step((), lambda _: True)
    assert core.pages.free == 4 and core.running_set.demand.met


def test_a_planned_copy_reads_pages_where_they_moved_to() -> None:
    core = short()
    young = row(core, "young")
    core.page_copies.leave(young)
    (page,) = young.pages
    core.page_copies.rename({page: 99})
    (copy,) = core.page_copies.planned()
    assert copy.pages == (99,)


# Prefixes


def saved(**settings: object) -> Scheduler:
    """Ten pages. The first four of the prompt "known" are in host memory, and on the device."""
    settings = {"pages": 10, "tokens": 256, "host_pages": 20, "host_cache": True, **settings}
    core = scheduler(**settings)  # type: ignore[arg-type]
    core.add(new("known", "a", prompt=70, max_tokens=2), 0.0)
    settle(core, 0.0)
    end(core)
    return core


def forget_on_device(core: Scheduler) -> None:
    assert core.pages.take(core.pages.capacity) is not None
    core.pages.give_back(range(core.pages.capacity))


def again(core: Scheduler, digest: str | None = "a", **fields: object) -> Request:
    known = new("known", digest, prompt=70, max_tokens=2, **fields)
    return core.add(dataclasses.replace(known, id="again"), 0.0)


def known_on_host(core: Scheduler, request: NewRequest) -> int:
    host = core.page_copies.host
    assert host is not None
    prefix = host.match(request.digest, request.prompt)
    host.give_back(prefix.pages)
    return len(prefix.pages)


def test_a_prefix_that_the_device_forgot_comes_from_host_memory() -> None:
    core = saved()
    forget_on_device(core)
    request = again(core)
    plan, copy = until_copy(core)
    assert not copy.out and list(copy.pages) == request.pages[:4] and ran(plan) == []
    for _ in range(3):
        assert ran(run(core)[0]) == [], "its pages are not there yet"
    core.pages_copied(copy.number, 0.0)
    plan, (delta,) = run(core)
    assert [(w.start, w.end) for w in plan.rows] == [(64, 70)] and delta.cached_tokens == 64
    end(core)
    assert not run(core)[0].page_copies, "host memory has all of it"


def test_what_the_device_still_has_is_not_copied() -> None:
    core = saved()
    request = again(core)
    plan, _ = run(core)
    assert ran(plan) == ["again"] and not plan.page_copies and request.cached == 64


def test_a_prefix_is_known_when_its_copy_is_done_and_not_before() -> None:
    core = scheduler(pages=10, tokens=256, host_pages=20, host_cache=True)
    request = new("known", prompt=70, max_tokens=2)
    core.add(request, 0.0)
    _, copy = until_copy(core)
    assert copy.out and len(copy.pages) == 4 and core.pages.free < core.pages.capacity
    assert known_on_host(core, request) == 0
    core.pages_copied(copy.number, 0.0)
    assert known_on_host(core, request) == 4 and core.pages.free == core.pages.capacity


def test_only_what_a_request_adds_to_a_prefix_is_copied_to_host_memory() -> None:
    core = saved()
    known = new("known", "a", prompt=70, max_tokens=2)
    request = core.add(
        dataclasses.replace(known, id="more", prompt=(*known.prompt, *range(30))), 0.0
    )
    _, copy = until_copy(core)
    assert copy.out and list(copy.pages) == request.pages[4:6]
    core.pages_copied(copy.number, 0.0)
    assert known_on_host(core, NewRequest("", request.prompt, known.sampling, "a")) == 6


@pytest.mark.parametrize("digest", [None, "b"])
def test_a_prefix_in_host_memory_is_its_adapters_own(digest: str | None) -> None:
    core = saved()
    forget_on_device(core)
    request = again(core, digest)
    for _ in range(3):
        settle(core, 0.0)
    assert request.cached == 0 and core.page_copies.back == 0


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed() -> None:
    core = saved()
    forget_on_device(core)
    request = again(core, prompt_logprobs=0)
    settle(core, 0.0)
    assert request.cached == 0 and core.page_copies.back == 0


def test_a_prefix_that_is_sooner_computed_stays() -> None:
    core = saved()
    forget_on_device(core)
    core.costs.pages_copied(1, 0.03)
    again(core)
    end(core)
    assert core.page_copies.back == 0


def test_the_devices_prefix_counts_if_it_is_longer_than_the_hosts() -> None:
    core = saved()
    for _ in range(20):
        core.costs.pages_copied(1, 0.1)
    known = new("known", "a", prompt=70, max_tokens=2)
    longer = dataclasses.replace(known, id="longer", prompt=(*known.prompt, *range(30)))
    core.add(longer, 0.0)
    end(core)
    assert known_on_host(core, longer) == 4, "so much was copied while copies were fast"
    request = core.add(dataclasses.replace(longer, id="again"), 0.0)
    end(core)
    assert request.cached == 96 and core.page_copies.back == 0


def test_rows_take_the_place_of_prefixes_in_host_memory() -> None:
    core = saved(pages=5, context=96, host_pages=5)
    known = new("known", "a", prompt=70)
    assert known_on_host(core, known) == 4
    begin(core, *(new(name, prompt=10, max_tokens=30) for name in ("old", "young")))
    _, copy = until_copy(core)
    core.pages_copied(copy.number, 0.0)
    end(core)
    assert known_on_host(core, known) < 4


def test_one_prefix_is_copied_at_a_time() -> None:
    core = scheduler(pages=16, tokens=256, host_pages=40, host_cache=True)
    for name in ("x", "y"):
        core.add(new(name, prompt=70, max_tokens=2), 0.0)
    assert len([copy for _ in range(5) for copy in run(core)[0].page_copies]) == 1


def test_no_prefix_is_copied_while_requests_wait_for_pages() -> None:
    core = scheduler(pages=8, tokens=256, host_pages=40, host_cache=True)
    core.add(new("x", prompt=70, max_tokens=2), 0.0)
    core.add(new("large", prompt=100, max_tokens=2), 0.0)
    for _ in range(3):
        assert not run(core)[0].page_copies


def test_a_request_that_is_cancelled_while_its_prefix_arrives_holds_it_until_then() -> None:
    core = saved()
    forget_on_device(core)
    again(core)
    _, copy = until_copy(core)
    assert core.cancel("again", 0.0)
    core.check()
    assert not free(core.pages) & set(copy.pages)
    core.pages_copied(copy.number, 0.0)
    end(core)
