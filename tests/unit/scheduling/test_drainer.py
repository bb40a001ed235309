"""A starving adapter gets a place: by a drain that ends, or by parking rows that resume."""

import pytest

from replica.scheduling.drainer import Drain
from replica.scheduling.loads import BASE_KEY, Switches
from replica.scheduling.request import Phase
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import begin, evicted, loaded, new, ran, run, scheduler, settle

DRAIN = Sharing(park=False, drain_wait_threshold_s=1.0)
PARK = Sharing(quantum_s=0.5, tpot_target_s=0.2)


def busy(sharing: Sharing, tokens: int = 60, **options: object) -> Scheduler:
    """a and b run one row each, and have all places."""
    core = scheduler(sharing=sharing, **options)  # type: ignore[arg-type]
    begin(core, new("x", "a", max_tokens=tokens), new("y", "b", max_tokens=tokens + 5))
    return core


# Drain


def test_a_drain_starts_at_the_threshold_and_not_before() -> None:
    core = busy(DRAIN)
    core.add(new("s", "c"), 0.0)
    run(core, 0.99)
    assert not core.drainer.drains
    run(core, 1.0)
    assert list(core.drainer.drains) == ["a"], "it ends first"
    assert core.drainer.started == 1


def test_without_a_threshold_nothing_is_drained() -> None:
    core = busy(Sharing(park=False))
    core.add(new("s", "c"), 0.0)
    run(core, 100.0)
    assert not core.drainer.drains


def test_a_drain_ends_if_its_victims_rows_left_before_their_first_step() -> None:
    """A fresh victim is not evicted, so neither its requests nor the starving one would run."""
    core = scheduler(sharing=DRAIN, arena=40)
    core.add(new("x", "a"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.1)
    core.add(new("s", "c"), 0.1)
    core.drainer.drains["a"] = Drain("c", frozenset())
    assert "x" in ran(run(core, 0.2)[0])


def test_the_requests_a_draining_adapter_may_take_are_fixed_at_the_start() -> None:
    core = busy(DRAIN, tokens=10)
    core.add(new("s", "c"), 0.0)
    core.running_set.rows_max = 2  # so that the next requests wait
    core.add(new("short", "a", max_tokens=5), 0.5)
    core.add(new("long", "a", max_tokens=50), 0.5)
    run(core, 1.0)
    assert core.drainer.drains["a"].admitted == {"short"}
    core.running_set.rows_max = 8
    core.add(new("late", "a", max_tokens=1), 1.1)
    plan, _ = run(core, 1.1)
    assert "short" in ran(plan)
    assert "late" not in ran(plan) and "long" not in ran(plan)


def test_a_drain_lasts_no_longer_than_the_rows_running_at_its_start() -> None:
    """A tolerance on what is left would admit 100, 120, 144 … tokens and never end."""
    core = busy(DRAIN, tokens=20)
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    left = max(r.remaining for r in core.running_set.running.values() if r.adapter_key == "a")
    for step in range(left + 1):
        core.add(new(f"n{step}", "a", max_tokens=left * 6 // 5), 1.0)
        plan, _ = run(core, 1.0 + step * 0.05)
        if "c" in loaded(plan):
            return
    raise AssertionError("the drain did not end")


def test_a_drained_place_goes_to_the_starving_adapter() -> None:
    core = busy(DRAIN, tokens=10)
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    core.add(new("urgent", "d", priority=-9), 1.1)
    core.cancel("x", 1.1)
    plan, _ = run(core, 1.1)
    assert loaded(plan) == ["c"] and evicted(plan) == ["a"]


def test_parking_does_not_take_a_drained_place() -> None:
    core = busy(Sharing(park=True, quantum_s=0.1, drain_wait_threshold_s=0.05), loads=1)
    core.add(new("s", "c"), 0.0)
    run(core, 0.06)  # their slices are not over, so a drain starts
    assert core.drainer.drains
    core.add(new("urgent", "d", priority=-9), 0.5)
    plan, _ = run(core, 0.5)
    assert set(evicted(plan)).isdisjoint(core.drainer.reserved_for_others("d"))


def test_a_cancelled_waiter_ends_its_drain() -> None:
    core = busy(DRAIN)
    core.add(new("s", "c"), 0.0)
    core.add(new("more", "a"), 1.0)
    core.running_set.rows_max = 2
    run(core, 1.0)
    core.running_set.rows_max = 8
    core.cancel("s", 1.1)
    plan, _ = run(core, 1.1)
    assert not core.drainer.drains and "more" in ran(plan)


def test_a_drain_is_as_urgent_as_those_who_still_wait_for_it() -> None:
    core = busy(DRAIN)
    core.add(new("s", "c"), 0.0)
    core.add(new("patient", "c", priority=1), 0.0)
    run(core, 1.0)
    core.add(new("more", "a"), 1.0)
    assert list(core.drainer.drains) == ["a"] and "more" not in ran(run(core, 1.05)[0])
    core.cancel("s", 1.1)
    assert "more" in ran(run(core, 1.1)[0])


def test_a_drain_ends_when_its_victim_is_gone() -> None:
    core = busy(DRAIN)
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    core.cancel("x", 1.1)
    core.forget("a")
    core.adapter_cache.register("d", "/d", 40, pinned=False, now_s=1.1)
    run(core, 1.1)
    assert "a" not in core.drainer.drains


def test_an_adapter_that_starves_for_pages_drains_no_other() -> None:
    core = scheduler(sharing=DRAIN, pages=8)
    begin(core, new("x", "a", prompt=60, max_tokens=60), new("y", "b", prompt=20, max_tokens=60))
    core.add(new("own", "a", prompt=60), 0.0)
    core.add(new("s", "c", prompt=60), 0.0)
    run(core, 1.5)
    assert not core.drainer.drains


def test_a_pinned_adapter_in_use_is_not_drained_though_it_ends_first() -> None:
    core = scheduler(sharing=DRAIN, pinned="p", sizes={"p": 40, "a": 40, "c": 40})
    begin(core, new("x", "p", max_tokens=30), new("y", "a", max_tokens=60))
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    assert list(core.drainer.drains) == ["a"]


def test_a_pinned_adapter_in_use_is_not_parked() -> None:
    core = scheduler(sharing=PARK, pinned="p", sizes={"p": 40, "a": 40, "c": 40})
    begin(core, new("x", "p", max_tokens=90), new("y", "a", max_tokens=60))
    for number in range(3):
        core.add(new(f"s{number}", "c", max_tokens=60), 0.0)
    for step in range(40):
        run(core, 1.0 + step * 0.05)
        if core.running_set.parked:
            break
    assert list(core.running_set.parked) == ["y"]


def test_idle_pinned_adapters_hold_places_and_are_never_drained() -> None:
    core = scheduler(sharing=DRAIN, pinned="p", sizes={"p": 40, "a": 40, "c": 40})
    begin(core, new("x", "a", max_tokens=60))
    assert core.adapter_cache.usable("p") and core.adapter_cache.adapters["p"].users == 0
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    assert list(core.drainer.drains) == ["a"]


def test_a_drain_serves_the_base_model_if_it_shares_the_slots() -> None:
    switches = Switches(base_slot="shared", overlap=False)
    core = scheduler(sharing=DRAIN, switches=switches, slots=2)
    begin(core, new("x", "a", max_tokens=60), new("y", "b", max_tokens=60))
    core.add(new("base"), 0.0)
    run(core, 1.0)
    assert {drain.starving for drain in core.drainer.drains.values()} == {BASE_KEY}
    core.cancel("x", 1.1)
    plan, _ = run(core, 1.1)
    assert "base" in ran(plan)


def test_a_large_image_drains_several_adapters() -> None:
    core = scheduler(sharing=DRAIN, sizes={"a": 40, "b": 40, "large": 90})
    begin(core, new("x", "a", max_tokens=60), new("y", "b", max_tokens=60))
    core.add(new("s", "large"), 0.0)
    run(core, 1.0)
    assert sorted(core.drainer.drains) == ["a", "b"]
    core.cancel("x", 1.1)
    plan, _ = run(core, 1.1)
    assert loaded(plan) == [], "one of the two is not enough"
    core.cancel("y", 1.2)
    plan, _ = run(core, 1.2)
    assert loaded(plan) == ["large"]


def test_no_adapter_is_drained_for_a_less_urgent_one() -> None:
    core = scheduler(sharing=DRAIN)
    begin(core, new("x", "a", max_tokens=60), new("y", "b", max_tokens=65, priority=5))
    core.add(new("s", "c", priority=1), 0.0)
    run(core, 1.0)
    assert list(core.drainer.drains) == ["b"], "a ends first, but its row is more urgent"


def test_a_draining_adapter_takes_requests_more_urgent_than_the_starving_one() -> None:
    core = busy(DRAIN)
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    core.add(new("late", "a"), 1.1)
    core.add(new("urgent", "a", priority=-1), 1.1)
    plan, _ = run(core, 1.1)
    assert "urgent" in ran(plan) and "late" not in ran(plan)


# Park


def test_the_less_urgent_never_parks_the_more_urgent() -> None:
    core = scheduler(sharing=PARK, arena=40)
    begin(core, new("urgent", "a", max_tokens=60, priority=-10))
    core.add(new("patient", "b", max_tokens=60, priority=10), 0.0)
    for step in range(1, 40):
        assert ran(settle(core, step * 1.0)[0]) == ["urgent"]
    core.cancel("urgent", 40.0)
    settle(core, 40.0)
    assert ran(settle(core, 41.0)[0]) == ["patient"]
    core.add(new("urgent again", "a", max_tokens=60, priority=-10), 41.0)
    settle(core, 45.0)
    assert ran(settle(core, 45.1)[0]) == ["urgent again"]


def test_an_adapter_that_a_more_urgent_request_waits_for_is_not_parked() -> None:
    """The batch is full, so the urgent request has no row yet."""
    core = scheduler(sharing=PARK, arena=40, rows=1)
    begin(core, new("x", "a", max_tokens=60, priority=10))
    core.add(new("urgent", "a", priority=-10, max_tokens=60), 0.0)
    core.add(new("patient", "b", max_tokens=60), 0.0)
    settle(core, 5.0)
    assert not core.running_set.parked


def test_of_the_victims_the_least_urgent_is_parked() -> None:
    core = scheduler(sharing=PARK)
    begin(core, new("x", "a", max_tokens=90), new("y", "b", max_tokens=40, priority=5))
    core.add(new("s", "c"), 0.0)
    run(core, 1.0)
    assert list(core.running_set.parked) == ["y"], "x has more left"


def test_a_row_is_parked_only_after_its_slice() -> None:
    core = busy(PARK)
    core.add(new("s", "c"), 0.0)
    plan, _ = run(core, 0.49)
    assert loaded(plan) == [] and not core.running_set.parked
    plan, _ = run(core, 0.5)
    assert loaded(plan) == ["c"] and evicted(plan) == ["b"], "it has the most left"
    assert core.running_set.parked["y"].phase is Phase.PARKED and core.running_set.parked["y"].pages


def test_no_row_is_parked_while_the_copy_would_wait_for_another() -> None:
    core = busy(PARK, copy_bytes_per_s=400.0)  # a copy takes 0.1 s, a step 0.05 s
    core.add(new("s", "c"), 0.0)
    core.add(new("t", "d"), 0.0)
    run(core, 1.0)
    assert list(core.running_set.parked) == ["y"]
    run(core, 1.04)
    assert list(core.running_set.parked) == ["y"]
    run(core, 1.05)
    assert list(core.running_set.parked) == ["y", "x"], "the first copy ends within a step"


def test_a_slice_starts_at_the_first_step_not_at_the_load() -> None:
    core = scheduler(sharing=PARK, arena=40)
    core.add(new("x", "a", max_tokens=60), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.1)
    run(core, 3.0)  # its first step
    core.add(new("s", "c"), 3.0)
    assert loaded(run(core, 3.49)[0]) == []
    assert loaded(run(core, 3.5)[0]) == ["c"]


def test_a_second_row_does_not_restart_the_slice() -> None:
    core = scheduler(sharing=PARK, arena=40)
    begin(core, new("x", "a", max_tokens=60))
    core.add(new("again", "a", max_tokens=60), 0.3)
    run(core, 0.3)
    core.add(new("s", "c"), 0.3)
    run(core, 0.49)
    assert loaded(run(core, 0.5)[0]) == ["c"]


def test_a_slice_lasts_five_copies_if_copies_are_slow() -> None:
    core = busy(PARK, copy_bytes_per_s=200.0)  # 0.2 s a copy, 0.4 s out and in
    core.add(new("s", "c"), 0.0)
    assert loaded(run(core, 1.99)[0]) == []
    assert loaded(run(core, 2.0)[0]) == ["c"]


def test_a_victim_that_ends_soon_is_waited_for_instead_of_parked() -> None:
    core = busy(PARK, tokens=60, copy_bytes_per_s=400.0)  # two copies: 0.2 s, 4 steps
    while core.running_set.running["x"].remaining > 4:
        run(core)
    core.add(new("s", "c"), 0.0)
    core.add(new("more", "a"), 0.0)
    plan, _ = run(core, 5.0)
    assert not core.running_set.parked and loaded(plan) == []
    assert "more" not in ran(plan), "an adapter that ends soon takes no new rows"
    for step in range(6):
        plan, _ = run(core, 5.05 + step * 0.05)
        if loaded(plan):
            break
    assert evicted(plan) == ["a"] and not core.running_set.parked


def test_of_victims_that_end_soon_the_first_to_end_is_waited_for() -> None:
    core = scheduler(sharing=PARK, copy_bytes_per_s=200.0)  # two copies: 0.4 s, 8 steps
    begin(core, new("x", "a", max_tokens=8), new("y", "b", max_tokens=7))
    core.add(new("s", "c"), 0.0)
    core.add(new("more", "a"), 0.0)
    core.add(new("none", "b"), 0.0)
    plan, _ = run(core, 0.0)
    assert loaded(plan) == [] and set(ran(plan)) == {"x", "y", "more"}


def test_only_as_many_victims_are_parked_as_the_bytes_need() -> None:
    core = scheduler(sharing=PARK, sizes={"a": 30, "b": 60, "small": 20, "large": 90})
    begin(core, new("x", "a", max_tokens=60), new("y", "b", max_tokens=60))
    core.add(new("s", "small"), 0.0)
    plan, _ = settle(core, 1.0)
    assert evicted(plan) == ["a"]
    core.cancel("s", 1.0)
    core.cancel("x", 1.0)
    core.add(new("l", "large"), 1.0)
    plan, _ = run(core, 2.0)
    assert loaded(plan) == ["large"] and set(evicted(plan)) == {"small", "b"}
    assert list(core.running_set.parked) == ["y"]


def test_small_images_do_not_take_one_by_one_the_places_that_an_overdue_large_one_needs() -> None:
    core = scheduler(sharing=PARK, sizes={"a": 45, "b": 45, "small": 45, "large": 90})
    begin(core, new("x", "a", max_tokens=90), new("y", "b", max_tokens=90))
    core.add(new("l", "large"), 0.0)
    core.add(new("s", "small"), 0.1)
    core.adapter_cache.adapters["b"].slice_s = 4.8  # a's slice is over, b's is not
    assert loaded(run(core, 5.0)[0]) == []
    plan, _ = run(core, 5.5)
    assert loaded(plan) == ["large"] and set(evicted(plan)) == {"a", "b"}


def test_an_adapter_that_was_loaded_but_has_not_run_is_kept() -> None:
    core = busy(PARK)
    core.add(new("s", "c"), 0.0)
    settle(core, 0.5)
    core.add(new("t", "d", priority=-5), 0.5)
    core.running_set.rows_max = len(core.running_set.running)  # s finds no row yet
    plan, _ = run(core, 5.0)
    assert "c" not in evicted(plan)


def test_a_parked_row_resumes_after_one_copy_and_recomputes_nothing() -> None:
    core = busy(PARK)
    core.add(new("s", "c", max_tokens=60), 0.0)
    settle(core, 0.5)
    request = core.running_set.parked["y"]
    pages, computed = list(request.pages), request.computed
    starts: dict[str, int] = {}
    copies = 0
    for step in range(1, 80):
        plan, _ = settle(core, 0.5 + step * 0.05)
        copies += loaded(plan).count("b")
        starts |= {w.request.id: w.start for w in plan.rows if w.request.id == "y"}
        if starts:
            break
    assert starts == {"y": computed} and copies == 1
    assert request.pages[: len(pages)] == pages


def test_parked_rows_hold_no_more_pages_than_they_may() -> None:
    core = busy(PARK, parked_pages_max=0)
    core.add(new("s", "c"), 0.0)
    plan, _ = run(core, 5.0)
    assert loaded(plan) == [] and not core.running_set.parked


def test_a_drain_starts_if_no_row_may_be_parked() -> None:
    core = busy(Sharing(park=True, drain_wait_threshold_s=1.0), parked_pages_max=0)
    core.add(new("s", "c"), 0.0)
    run(core, 5.0)
    assert {drain.starving for drain in core.drainer.drains.values()} == {"c"}


def test_an_adapter_that_starves_for_pages_parks_no_row_and_drains_late() -> None:
    core = scheduler(sharing=PARK, pages=8, page_wait_max_s=2.0)
    begin(core, new("x", "a", prompt=60, max_tokens=60), new("y", "b", prompt=20, max_tokens=60))
    core.add(new("s", "c", prompt=60), 0.0)
    for now_s in (1.9, 2.1, 5.0):
        assert loaded(run(core, now_s)[0]) == []
        assert not core.running_set.parked and not core.drainer.drains
    run(core, 6.0)
    assert {drain.starving for drain in core.drainer.drains.values()} == {"c"}
    assert not core.running_set.parked


def test_no_row_is_parked_while_pages_are_short_or_soon_after() -> None:
    core = busy(PARK, pages=16, context=256)
    core.add(new("large", prompt=240, max_tokens=4), 0.9)
    core.add(new("s", "c"), 0.9)
    run(core, 1.0)
    core.cancel("large", 1.1)
    run(core, 1.2)
    run(core, 5.9)
    assert not core.running_set.parked
    assert loaded(run(core, 6.1)[0]) == ["c"]


def test_no_row_is_parked_while_prompts_pile_up() -> None:
    core = busy(PARK, pages=400, context=1200, tokens=16)
    for i in range(2):
        core.add(new(f"base{i}", prompt=1000, max_tokens=4), 0.9)
    core.add(new("s", "c"), 0.9)
    for _ in range(3):
        assert loaded(run(core, 1.0)[0]) == []
    assert not core.running_set.parked


@pytest.mark.parametrize(("pages", "stays"), [(13, False), (14, True)])
def test_a_row_is_parked_only_if_its_pages_can_stay(pages: int, stays: bool) -> None:
    """x and y hold a page each. At once, x needs 3 more, y up to 4 and s 5: x has no known end."""
    core = busy(PARK, pages=pages, growth_outputs=2.0)
    core.add(new("s", "c", prompt=16, max_tokens=64), 0.0)
    assert core.running_set.park_all(("a",), core.waiting.head("c"), 0.0) is stays
    assert list(core.running_set.parked) == ["x"] * stays
    core.check()


def test_parked_rows_take_the_place_kept_for_a_request_without_pages() -> None:
    core = scheduler(sharing=PARK, arena=40, pages=8)
    begin(core, new("x", "a", prompt=40, max_tokens=60))
    core.add(new("s", "c", prompt=60), 0.0)
    assert loaded(run(core, 0.6)[0]) == ["c"] and list(core.running_set.parked) == ["x"]
    core.add(new("base", prompt=30, max_tokens=40), 0.7)
    run(core, 0.7)
    core.loaded("c", 0.7)
    run(core, 0.7)
    assert "s" not in core.running_set.running, "base has its pages"
    plan, _ = run(core, 0.8)
    assert loaded(plan) == ["a"] and evicted(plan) == ["c"]


@pytest.mark.parametrize(
    ("waiting", "places", "turns"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (12, 3, 4), (3, 0, 3)]
)
def test_a_turn_is_a_slice_and_two_copies(waiting: int, places: int, turns: int) -> None:
    core = scheduler(sharing=PARK, copy_bytes_per_s=400.0)
    all_s = core.drainer.turns.all_s(waiting, places, 40)
    assert all_s == pytest.approx(turns * (1.0 + 0.2))
    assert core.drainer.turns.bound_s(waiting, places, 40) == pytest.approx(31 * all_s)


def test_no_pages_are_saved_for_a_request_that_a_drain_keeps_out() -> None:
    """Its adapter is drained for a large image, which needs a second place: that of an adapter
    whose request came before, and finds pages only if none are saved.
    """
    sharing = Sharing(park=False, drain_wait_threshold_s=0.2)
    sizes = {"a": 30, "b": 40, "second": 50, "large": 55}
    core = scheduler(pages=6, sizes=sizes, sharing=sharing, page_wait_max_s=0.0)
    begin(core, new("x", "a", prompt=10, max_tokens=20), new("y", "b", prompt=10, max_tokens=10))
    core.add(new("kept out", "a", prompt=70, max_tokens=25), 0.0)
    core.add(new("earlier", "second", prompt=30), 0.0)
    core.add(new("starves", "large"), 0.0)
    now_s = 0.0
    while core.drainer.drains.get("a") is None:
        settle(core, now_s)
        assert core.running_set.saved.request is core._requests["kept out"]
        now_s += 0.05
    while core.has_work and now_s < 20.0:
        settle(core, now_s)
        now_s += 0.05
    assert not core.has_work
