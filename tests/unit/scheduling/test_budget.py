"""One memory for adapters and KV pages: when each gives memory to the other."""

from dataclasses import replace

import pytest

from cluster.values import Tier
from replica.scheduling.adapter import PageMove
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.pages import Pages
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from tests.core import begin, evicted, loaded, new, ran, run, scheduler, settle


def budget(total: int = 20, context: int = 4, headroom: int = 2) -> tuple[Budget, Pages, Extents]:
    pages, extents = Pages(total, 2), Extents(0, 1)
    return Budget(extents, pages, 10, context, headroom), pages, extents


def shared(pages: int = 20, headroom: int = 2, **settings: object) -> Scheduler:
    """Adapters take 4 pages each. One context, also 4 pages, is never theirs."""
    return scheduler(pages=pages, page_bytes=10, context=64, headroom=headroom, **settings)  # type: ignore[arg-type]


def arena_bytes(core: Scheduler) -> int:
    return core.adapter_cache.extents.capacity


def placed(core: Scheduler) -> list[str]:
    return sorted(core.adapter_cache.placed)


def hold(core: Scheduler, pages: int, name: str = "long") -> None:
    """Start a base request that holds this many pages for a dozen steps."""
    begin(core, new(name, None, prompt=pages * 16 - 12, max_tokens=12))


def use(core: Scheduler, *digests: str) -> None:
    """Load each adapter, run a request with it, and leave it idle."""
    for digest in digests:
        core.add(new(f"use {digest}", digest, max_tokens=1), 0.0)
        while core.waiting.waited_for(digest):
            settle(core, 0.0)
        assert core.adapter_cache.usable(digest)


# The budget alone


def test_the_limit_leaves_one_context_the_headroom_and_the_reserve() -> None:
    made, pages, _ = budget()
    assert (made.most_bytes, made.limit_bytes()) == (160, 160)
    pages.take(10)
    assert made.limit_bytes() == 80
    assert made.limit_bytes(reserved=3) == 50
    assert made.free_for(51, 3) == 6 + 2 + 3
    assert (made.free_for(160, 3), made.free_for(161, 3)) == (16 + 5, None)
    pages.take(9)
    assert made.limit_bytes() == 0


def test_the_headroom_is_never_more_than_the_context() -> None:
    """Otherwise an image that just fits could not load even when nothing runs."""
    made, _, _ = budget(headroom=100)
    assert made.limit_bytes() == made.most_bytes == 160


def test_growing_takes_free_pages_and_copies_held_ones_elsewhere() -> None:
    made, pages, extents = budget()
    held = pages.take(20)
    assert held is not None
    mine = [0, 3, 19]
    pages.give_back([p for p in held if p not in mine])
    assert made.grow(31) == (PageMove(0, 18), PageMove(3, 17))
    assert (pages.first, extents.capacity, pages.capacity, pages.free) == (4, 40, 16, 13)
    pages.check([[18, 17, 19]])
    made.check()


def test_growing_forgets_prefixes_only_if_no_other_page_is_free() -> None:
    made, pages, _ = budget(total=8, context=1, headroom=0)
    held = pages.take(8) or []
    assert held == [7, 6, 5, 4, 3, 2, 1, 0]
    link: str | int | None = "a"
    for i, page in enumerate(held[4:]):
        link = pages.publish(link, [i, i], page)
    pages.give_back(held[4:])
    pages.give_back(held[:2])
    assert made.grow(20) == (PageMove(0, 7), PageMove(1, 6))
    prefix = pages.match("a", [0, 0, 1, 1, 2, 2, 3, 3])
    assert prefix.pages == (3, 2, 6, 7), "two pages were free, so the whole prefix was kept"
    pages.give_back(prefix.pages)
    assert made.grow(30) == (PageMove(2, 7),)
    assert pages.match("a", [0, 0, 1, 1, 2, 2, 3, 3]).pages == (3, 7, 6), "the end was forgotten"


def test_a_copied_prefix_keeps_its_turn_to_be_forgotten() -> None:
    made, pages, _ = budget(total=6, context=1, headroom=0)
    held = pages.take(6) or []
    for page in (2, 1, 0):
        pages.publish(f"was {page}", [9, 9], page)
    for page in (2, 0, 1, *held[:2]):
        pages.give_back([page])
    assert made.grow(10) == (PageMove(0, 5),)
    assert pages.take(2) == [4, 2], "the oldest prefix went first"
    assert pages.take(1) == [5], "then the one that was copied"
    assert pages.match("was 1", [9, 9]).pages == (1,)


def test_shrinking_gives_back_the_asked_pages_or_the_headroom_if_that_is_more() -> None:
    made, pages, extents = budget(headroom=3)
    made.grow(100)
    extents.take("a", 20)
    made.shrink(1)
    assert (pages.first, extents.capacity) == (7, 70)
    made.shrink(5)
    assert pages.first == 2
    with pytest.raises(AssertionError, match="an image uses these pages"):
        made.shrink(1)
    made.check()


def test_pages_come_back_free_and_are_handed_out_last() -> None:
    made, pages, _ = budget()
    made.grow(40)
    made.shrink(4)
    taken = pages.take(20)
    assert taken == list(range(19, -1, -1))
    pages.check([taken])


# With a scheduler


def test_the_arena_grows_for_each_adapter_and_evicts_none() -> None:
    core = shared()
    begin(core, *(new(d, d) for d in "abcd"))
    assert placed(core) == list("abcd")
    assert (arena_bytes(core), core.pages.capacity) == (160, 4)


def test_an_idle_adapter_leaves_for_another_only_when_no_page_is_left() -> None:
    core = shared(sizes=dict.fromkeys("abcde", 40))
    use(core, *"abcd")
    assert placed(core) == list("abcd")
    use(core, "e")
    assert placed(core) == list("bcde")


def test_growing_leaves_the_headroom_to_running_rows() -> None:
    core = shared(headroom=3, pages=10)
    hold(core, 4)
    core.add(new("x", "a"), 0.0)
    plan, _ = run(core)
    assert core.pages.free == 6 and loaded(plan) == []
    core.cancel("long", 0.0)
    plan, _ = run(core)
    assert loaded(plan) == ["a"]


def test_held_pages_in_the_way_are_copied_and_their_rows_follow() -> None:
    core = shared(headroom=0)
    begin(core, *(new(f"r{i}", None, prompt=20, max_tokens=12) for i in range(7)))
    hold(core, 2, "r7")
    core.running_set.rows_max = 9
    hold(core, 2, "low")
    assert core.running_set.running["low"].pages == [3, 2]
    for i in range(8):
        core.cancel(f"r{i}", 0.0)
    core.add(new("x", "a"), 0.0)
    plan = core.step(0.0)
    (change,) = plan.arena_changes
    assert change.page_moves == (PageMove(2, 18), PageMove(3, 16)), "19 and 17 hold prefixes"
    assert core.running_set.running["low"].pages == [16, 18]
    core.check()


def test_the_pages_of_a_parked_row_are_copied_too() -> None:
    core = shared(headroom=0, sizes={"a": 10, "b": 40})
    use(core, "a")
    for i in range(4):
        hold(core, 4, f"r{i}")
    begin(core, new("x", "a", prompt=40, max_tokens=20))
    assert core.running_set.running["x"].pages == [3, 2, 1]
    for i in range(4):
        core.cancel(f"r{i}", 0.0)
    core.add(new("y", "b", priority=-1), 0.0)
    assert core.running_set.park_all(("a",), core.waiting.head("b"), 0.0)
    (change,) = core.step(0.0).arena_changes
    assert [move.source for move in change.page_moves] == [1, 2, 3]
    assert core.running_set.running["x"].pages == [m.target for m in reversed(change.page_moves)]
    core.check()


def test_an_idle_adapter_leaves_for_a_running_row() -> None:
    core = shared(pages=9, headroom=0)
    use(core, "a")
    hold(core, 4, "one")
    begin(core, new("two", None, prompt=14, max_tokens=20))
    assert (core.pages.free, placed(core)) == (0, ["a"])
    for _ in range(4):
        plan, _ = run(core)
        assert "two" in ran(plan)
    assert placed(core) == [] and arena_bytes(core) < 40
    assert core.adapter_cache.adapters["a"].tier is Tier.DISK
    assert core.timelines.counts[Event.PREEMPTED] == 0


@pytest.mark.parametrize("why", ["pinned", "running", "fresh"])
def test_pinned_used_and_fresh_adapters_do_not_leave_for_pages(why: str) -> None:
    core = shared(pages=9, headroom=0, rows=2, pinned="a" if why == "pinned" else "")
    if why == "running":
        begin(core, new("x", "a", max_tokens=60))
    elif why == "pinned":
        settle(core, 0.0)
    else:
        begin(core, new("one", max_tokens=60), new("two", max_tokens=60))
        core.add(new("x", "a", priority=1), 0.0)
        settle(core, 0.0)
    assert placed(core) == ["a"]
    core.running_set.rows_max = 8
    for i in range(6):
        core.add(new(f"r{i}", None, prompt=15, max_tokens=20), 0.0)
    for _ in range(8):
        run(core)
        assert placed(core) == ["a"]
    assert core.timelines.counts[Event.PREEMPTED] > 0


def test_a_new_request_evicts_no_adapter_that_another_waits_for() -> None:
    core = shared(pages=12, headroom=0, rows=2)
    use(core, "a")
    hold(core, 4, "one")
    hold(core, 3, "two")
    core.add(new("y", "a", prompt=30), 0.0)
    core.add(new("base", None, prompt=60, max_tokens=1, priority=-1), 0.0)
    core.running_set.rows_max = 4
    plan, _ = run(core)
    assert core.pages.free == 1 and ran(plan) == ["one", "two"]
    assert evicted(plan) == [], "y waits for a, and for pages"
    core.cancel("y", 0.0)
    plan, _ = run(core)
    assert evicted(plan) == ["a"] and "base" in ran(plan)


def test_an_adapter_too_large_beside_one_context_is_refused() -> None:
    core = shared()
    assert core.adapter_cache.refusal("x", 160, pinned=False) is None
    assert "there are 160 for adapters" in (
        core.adapter_cache.refusal("x", 161, pinned=False) or ""
    )
    assert "take 121" in (core.adapter_cache.refusal("x", 121, pinned=True) or "")


def test_a_request_of_a_whole_context_always_finds_its_pages() -> None:
    core = shared(headroom=0)
    use(core, *"abcd")
    begin(core, new("whole", "d", prompt=60, max_tokens=4))
    assert placed(core) == list("abcd")


@pytest.mark.parametrize("prompt", ["of its own", "of a row"])
def test_freed_pages_are_kept_for_an_adapter_that_starved_too_long(prompt: str) -> None:
    """Otherwise a stream of base requests would take each page as it comes free."""
    core = shared(pages=10, headroom=0, page_wait_max_s=1.0)
    now_s = 0.0
    begin(core, *(new(f"b{i}", None, prompt=18, max_tokens=8 + i) for i in range(5)))
    assert core.pages.free == 0
    core.add(new("x", "a"), now_s)
    came_s = None
    while came_s is None:
        now_s += 0.05
        name = f"c{now_s}" if prompt == "of its own" else "b4"
        core.add(replace(new(name, prompt=18, max_tokens=12), id=f"c{now_s}"), now_s)
        plan, _ = settle(core, now_s)
        came_s = now_s if "a" in loaded(plan) else None
        assert now_s < 3.0
    assert 1.0 < came_s < 2.0
    assert core.waiting.waited_for(None), "other requests wait, and did not take the pages"


def test_a_request_never_evicts_its_own_adapter_for_pages() -> None:
    core = shared(pages=12, headroom=0)
    use(core, "a")
    request = core.add(new("mine", "a"), 0.0)
    more = core.pages.free + 1
    assert core.running_set._supply.take(more, 0.0, drop=True, requester=request) is None
    assert placed(core) == ["a"]
    assert core.running_set._supply.take(more, 0.0, drop=True) is not None and not placed(core)


def test_a_request_that_waits_longer_than_the_adapter_goes_first() -> None:
    """A request that was passed over before the adapter starved is not held up for it."""
    core = shared(pages=10, headroom=0, page_wait_max_s=1.0)
    for i in range(5):
        core.add(new(f"b{i}", None, prompt=20, max_tokens=12 + 4 * i), 0.0)
    run(core, 0.0)
    core.add(new("large", None, prompt=60, max_tokens=1), 0.0)
    run(core, 0.01)
    core.add(new("x", "a"), 0.2)
    order: list[str] = []
    beside: list[str] = []
    now_s = 1.5
    while core.has_work:
        plan, _ = settle(core, now_s)
        order += [name for name in ran(plan) if name in ("large", "x") and name not in order]
        beside = beside or ([name for name in ran(plan) if name[0] == "b"] if order else [])
        now_s += 0.05
        assert now_s < 10.0
    assert order == ["large", "x"]
    assert beside == ["b2", "b3"], "it started as soon as there were pages for it"


def test_parked_rows_lose_pages_to_an_adapter_that_starved_too_long() -> None:
    sizes = {"a": 10, "b": 40}
    core = shared(pages=9, headroom=0, sizes=sizes, pinned="a", page_wait_max_s=0.0)
    settle(core, 0.0)
    begin(core, new("old", "a", prompt=50, max_tokens=10))
    begin(core, new("young", "a", prompt=10, max_tokens=4))
    core.add(new("y", "b"), 0.0)
    plan, _ = run(core)
    assert core.pages.free == 3 and loaded(plan) == []
    core.running_set.park_all(("a",), core.waiting.head("b"), 0.0)
    plan, _ = run(core, 0.1)
    assert loaded(plan) == ["b"]
    assert ran(plan) == ["old"], "the newer one lost its pages"


def test_parked_rows_keep_pages_that_would_not_be_enough() -> None:
    sizes = {"a": 10, "b": 100}
    core = shared(pages=15, headroom=0, sizes=sizes, pinned="a", page_wait_max_s=0.0)
    settle(core, 0.0)
    hold(core, 4)
    hold(core, 2, "more")
    begin(core, new("old", "a", prompt=50, max_tokens=10))
    core.add(new("y", "b"), 0.0)
    run(core)
    core.running_set.park_all(("a",), core.waiting.head("b"), 0.0)
    plan, _ = run(core, 0.1)
    assert core.pages.free == 4 and loaded(plan) == []
    assert ran(plan) == ["long", "more", "old"]
    assert core.timelines.counts[Event.PREEMPTED] == 0


def test_without_overlap_a_planned_row_keeps_its_adapter() -> None:
    core = shared(pages=10, headroom=0)
    begin(core, new("x", "a", max_tokens=30))
    begin(core, new("y", None, prompt=60, max_tokens=4))
    core.add(new("z", None, prompt=40, max_tokens=4), 0.0)
    plan, _ = run(core)
    assert ran(plan) == ["x", "y"] and evicted(plan) == []
