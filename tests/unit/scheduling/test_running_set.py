"""When pages run out, parked rows lose theirs first, newest first. No request is lost."""

from replica.scheduling.drainer import Sharing
from replica.scheduling.loads import Switches
from replica.scheduling.request import Phase
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from tests.core import begin, new, ran, run, scheduler, settle

PARK = Sharing(quantum_s=0.5, head_start_s=0.0)


def two_parked(pages: int) -> Scheduler:
    """x (older) and y are parked with three pages each. Nothing else is held."""
    core = scheduler(sharing=PARK, arena=40, pages=pages, tokens=128)
    begin(core, new("x", "a", prompt=40, max_tokens=60), new("y", "a", prompt=40, max_tokens=60))
    core.add(new("s", "b", max_tokens=2), 0.0)
    settle(core, 0.5)
    assert list(core.running_set.parked) == ["x", "y"]
    core.cancel("s", 0.5)
    return core


def test_parked_rows_lose_their_pages_newest_first() -> None:
    core = two_parked(pages=7)
    core.add(new("base", prompt=10, max_tokens=30), 0.6)
    for step in range(10):
        plan, _ = run(core, 0.6)
        assert "base" in ran(plan), f"step {step}"
    assert list(core.running_set.parked) == ["x"], "y lost its pages to base, which grew"
    assert core.timelines.counts[Event.PREEMPTED] == 1


def test_a_new_request_takes_no_pages_of_parked_rows_while_others_run() -> None:
    core = two_parked(pages=8)
    core.add(new("base", prompt=4, max_tokens=12), 0.6)
    run(core, 0.6)
    core.add(new("large", prompt=30, max_tokens=4), 0.6)
    plan, _ = run(core, 0.6)
    assert ran(plan) == ["base"] and len(core.running_set.parked) == 2


def test_parked_rows_resume_though_requests_before_them_find_no_pages() -> None:
    core = two_parked(pages=7)
    core.add(new("base", prompt=4, max_tokens=12), 0.6)
    run(core, 0.6)
    assert core.pages.free == 0
    for name in ("first", "second"):
        core.add(new(name, priority=-1), 0.6)
    core.loaded("a", 0.6)
    plan, _ = run(core, 0.6)
    assert ran(plan) == ["base", "x", "y"]


def test_an_overdue_request_gets_the_next_free_pages_but_none_of_parked_rows() -> None:
    core = two_parked(pages=7)
    core.add(new("base", prompt=4, max_tokens=12), 0.6)
    core.add(new("patient"), 0.6)
    run(core, 0.6)
    core.add(new("urgent", priority=-1), 3.0)
    plan, _ = run(core, 3.0)
    assert ran(plan) == ["base"] and list(core.running_set.parked) == ["x", "y"]
    core.cancel("base", 3.1)
    plan, _ = run(core, 3.1)
    assert ran(plan) == ["patient"] and list(core.running_set.parked) == ["x", "y"]


def test_a_request_alone_takes_pages_of_parked_rows() -> None:
    core = two_parked(pages=7)
    core.add(new("large", prompt=30, max_tokens=4), 0.6)
    plan, _ = run(core, 0.6)
    assert ran(plan) == ["large"] and list(core.running_set.parked) == ["x"]


def test_rows_that_lost_their_pages_still_end_with_every_token() -> None:
    core = two_parked(pages=7)
    core.add(new("base", prompt=10, max_tokens=60), 0.6)
    counts = {"x": 0, "y": 0, "base": 0}
    for step in range(800):
        _, deltas = settle(core, 0.6 + step * 0.05)
        for delta in deltas:
            assert delta.error is None
            counts[delta.request_id] += len(delta.tokens)
        if not core.has_work:
            break
    assert counts["base"] == 60 and counts["x"] >= 58 and counts["y"] >= 58
    assert core.pages.free == 7


def test_the_newest_row_is_preempted_not_the_one_that_grows() -> None:
    core = scheduler(pages=4)
    begin(core, new("old", prompt=16, max_tokens=40), new("new", prompt=16, max_tokens=40))
    for _ in range(40):
        run(core)
        if core.timelines.counts[Event.PREEMPTED]:
            break
    assert list(core.running_set.running) == ["old"]
    assert [r.id for r in core.waiting] == ["new"]
    assert next(iter(core.waiting)).phase is Phase.WAITING


def test_a_large_prompt_is_not_passed_over_forever() -> None:
    core = scheduler(pages=8, page_wait_max_s=1.0)
    begin(core, new("first", prompt=50, max_tokens=13))
    core.add(new("large", prompt=100, max_tokens=2), 0.0)
    now_s, number = 0.0, 0
    while "large" not in core.running_set.running and now_s < 20.0:
        for _ in range(2):  # short ones keep coming, and each finds pages
            core.add(new(f"short{number}", prompt=20, max_tokens=8), now_s)
            number += 1
        run(core, now_s)
        now_s += 0.05
    assert 1.0 < now_s < 4.0


def test_a_large_prompt_of_an_absent_adapter_is_not_passed_over_forever() -> None:
    """Else its pages would wait for a place, and its place for pages."""
    core = scheduler(pages=10, sharing=PARK, arena=80, page_wait_max_s=1.0)
    begin(core, new("x", "a", prompt=20, max_tokens=20), new("y", "b", prompt=20, max_tokens=20))
    core.add(new("large", "c", prompt=100, max_tokens=2), 0.0)
    now_s, number = 0.0, 0
    while "large" not in core.running_set.running and now_s < 20.0:
        for digest in "ab":
            if sum(r.adapter_key == digest for r in core.waiting) < 3:
                core.add(new(f"{digest}{number}", digest, prompt=20, max_tokens=20), now_s)
                number += 1
        settle(core, now_s)
        now_s += 0.05
    assert now_s < 6.0


def test_pages_saved_for_a_cancelled_request_are_free_again() -> None:
    core = scheduler(pages=8, page_wait_max_s=0.5)
    begin(core, new("first", prompt=50, max_tokens=60))
    core.add(new("large", prompt=100), 0.0)
    run(core, 0.0)
    core.add(new("short", prompt=20), 1.0)
    assert "short" not in ran(run(core, 1.0)[0])
    core.cancel("large", 1.1)
    assert "short" in ran(run(core, 1.1)[0])


def test_with_on_miss_block_no_request_passes_the_first() -> None:
    core = scheduler(pages=4, switches=Switches(on_miss="block"))
    begin(core, new("first", prompt=33, max_tokens=9))
    core.add(new("large", prompt=40), 0.0)
    core.add(new("short", prompt=10), 0.0)
    assert ran(run(core)[0]) == ["first"]
