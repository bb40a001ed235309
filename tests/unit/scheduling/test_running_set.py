"""When pages run out, parked rows lose theirs first, newest first. No request is lost."""

from dataclasses import replace

from replica.scheduling.loads import Switches
from replica.scheduling.pages import Prefix
from replica.scheduling.request import NewRequest, Phase, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from replica.scheduling.turns import Sharing
from tests.core import begin, loaded, new, ran, run, scheduler, settle

PARK = Sharing(quantum_s=0.5)


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
    core.add(new("later"), 3.0)
    plan, _ = run(core, 3.0)
    assert ran(plan) == ["base"] and list(core.running_set.parked) == ["x", "y"]
    core.cancel("base", 3.1)
    plan, _ = run(core, 3.1)
    assert ran(plan) == ["patient"] and list(core.running_set.parked) == ["x", "y"]


def test_pages_saved_for_a_request_go_to_a_more_urgent_one() -> None:
    core = two_parked(pages=8)
    for name in ("base", "other"):
        core.add(new(name, prompt=4, max_tokens=12), 0.6)
    core.add(new("patient", prompt=30), 0.6)
    run(core, 0.6)
    core.add(new("later"), 3.0)
    core.cancel("base", 3.0)
    assert ran(run(core, 3.0)[0]) == ["other"], "a page is free, but patient needs two"
    core.add(new("urgent", priority=-1), 3.1)
    assert ran(run(core, 3.1)[0]) == ["other", "urgent"]


def test_a_more_urgent_request_is_tried_before_the_one_that_found_no_pages() -> None:
    core = two_parked(pages=7)
    core.add(new("base", prompt=4, max_tokens=12), 0.6)
    core.add(new("patient"), 0.6)
    run(core, 0.6)
    core.add(new("urgent", priority=-1), 3.0)
    run(core, 3.0)
    core.cancel("base", 3.1)
    assert ran(run(core, 3.1)[0]) == ["urgent"]
    core.cancel("urgent", 3.2)
    assert ran(run(core, 3.2)[0]) == ["patient"]


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


def test_the_least_urgent_row_is_preempted_first() -> None:
    core = scheduler(pages=4)
    begin(core, new("patient", prompt=16, max_tokens=40, priority=5))
    begin(core, new("urgent", prompt=16, max_tokens=40, priority=-5))
    while not core.timelines.counts[Event.PREEMPTED]:
        run(core)
    assert list(core.running_set.running) == ["urgent"]


def test_of_parked_rows_the_least_urgent_lose_their_pages_first() -> None:
    core = scheduler(sharing=PARK, arena=40, pages=7, tokens=128)
    begin(core, new("x", "a", prompt=40, max_tokens=60, priority=5))
    begin(core, new("y", "a", prompt=40, max_tokens=60))
    core.add(new("s", "b", max_tokens=2), 0.0)
    settle(core, 0.5)
    core.cancel("s", 0.5)
    assert list(core.running_set.parked) == ["y", "x"]
    core.add(new("base", prompt=10, max_tokens=30), 0.6)
    while not core.timelines.counts[Event.PREEMPTED]:
        run(core, 0.6)
    assert list(core.running_set.parked) == ["y"]


def test_a_less_urgent_row_is_preempted_before_a_parked_one() -> None:
    core = two_parked(pages=8)
    for name, priority in (("base", 0), ("patient", 5)):
        core.add(new(name, prompt=10, max_tokens=30, priority=priority), 0.6)
    while not core.timelines.counts[Event.PREEMPTED]:
        assert set(ran(run(core, 0.6)[0])) <= {"base", "patient"}
    assert list(core.running_set.parked) == ["x", "y"]
    assert list(core.running_set.running) == ["base"]


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


def test_pages_saved_for_a_request_reach_it_past_many_that_may_not_have_them() -> None:
    """They came before it, but their adapter loads after it was passed over."""
    core = scheduler(pages=8, tokens=256, queue=200, page_wait_max_s=1.0)
    for i in range(100):
        core.add(new(f"early{i}", "a", prompt=20, max_tokens=8), 0.0)
    core.add(new("on", prompt=4, max_tokens=100), 0.0)
    core.add(new("filler", prompt=60, max_tokens=13), 0.0)
    core.add(new("large", prompt=60, max_tokens=2), 0.0)
    plan, _ = run(core, 0.0)
    assert loaded(plan) == ["a"] and core.running_set.saved.request is core._requests["large"]
    core.loaded("a", 0.0)
    for step in range(1, 50):
        run(core, step * 0.05)
        if "large" in core.running_set.running:
            break
    assert step > 20 and {"on", "large"} <= core.running_set.running.keys()


def test_a_request_with_a_cached_prefix_leaves_the_saved_pages_too() -> None:
    core = scheduler(pages=8, tokens=256, page_wait_max_s=1.0)
    begin(core, new("on", prompt=40, max_tokens=80), new("known", prompt=40, max_tokens=2))
    settle(core, 0.0)
    core.add(new("large", prompt=100, max_tokens=2), 0.0)
    run(core, 0.0)
    core.add(replace(new("known", prompt=40), id="again"), 2.0)
    assert "again" not in ran(run(core, 2.0)[0]), "the free pages are saved for large"
    core.cancel("large", 2.0)
    assert "again" in ran(run(core, 2.0)[0])


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


def crowded(waiting: int) -> Scheduler:
    """Two rows hold nearly all pages. The others begin with the same 64 tokens, and wait."""
    core = scheduler(rows=64, pages=14, queue=waiting, context=128, growth_outputs=2.0)
    system = tuple(range(64))
    for i in range(2 + waiting):
        name, prompt = f"r{i}", (*system, *range(1000 * i + 1000, 1000 * i + 1024))
        core.add(NewRequest(name, prompt, Sampling(max_tokens=39, ignore_eos=True)), 0.0)
        if not i:
            run(core)  # the others find its pages
    for step in range(30):
        run(core, step * 0.1)
    return core


def count_matches(core: Scheduler, now_s: float) -> int:
    match, count = core.pages.match, 0

    def counted(*arguments: object) -> Prefix:
        nonlocal count
        count += 1
        return match(*arguments)  # type: ignore[arg-type]

    core.pages.match = counted  # type: ignore[method-assign]
    core.step(now_s)
    return count


def test_a_request_that_finds_no_pages_does_not_match_its_prefix_again() -> None:
    """A match and its undoing took 0.1 ms for each request, in each step."""
    core = crowded(waiting=40)
    assert core.running_set.short_of_pages and core.waiting
    assert count_matches(core, 3.0) == 0


def test_a_step_tries_few_requests_also_while_pages_are_saved() -> None:
    core = crowded(waiting=400)
    tried = [r for r in core.waiting if r.prefix is not None]
    assert len(tried) <= 100, "the first ones, and none behind them"


def test_a_request_that_found_no_pages_is_tried_again_when_its_cached_prefix_grows() -> None:
    core = scheduler(pages=7, tokens=40)
    first, second = ((*range(64), *range(start, start + 8)) for start in (1000, 2000))
    core.add(NewRequest("first", first, Sampling(max_tokens=8)), 0.0)
    run(core)
    core.add(NewRequest("second", second, Sampling(max_tokens=8)), 0.0)
    assert ran(run(core)[0]) == ["first"], "two of its five pages are cached, and two are free"
    assert ran(run(core)[0]) == ["first", "second"], "four are"
