"""Images load before their requests have rows, but never evict one needed sooner."""

from replica.scheduling.loads import Switches, loaded_ahead, needed_sooner
from replica.scheduling.service_order import ServiceOrder
from replica.scheduling.timeline import Event
from replica.scheduling.turns import Sharing
from tests.core import begin, evicted, loaded, new, run, scheduler, settle


def test_loads_begin_even_if_the_batch_is_full() -> None:
    core = scheduler(rows=1)
    begin(core, new("base", max_tokens=60))
    assert core.running_set.full
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    assert loaded(run(core)[0]) == ["a", "b"]


def test_loads_are_bounded_by_free_rows_and_prefetch_depth() -> None:
    core = scheduler(rows=1, arena=160, loads=8, switches=Switches(prefetch_depth=2))
    begin(core, new("base", max_tokens=60))
    for digest in "abcd":
        core.add(new(f"for-{digest}", digest), 0.0)
    assert loaded(run(core)[0]) == ["a", "b"]
    core.loaded("a", 0.0)
    assert loaded(run(core)[0]) == [], "a loaded but unused adapter counts too"


def test_depth_zero_loads_nothing_for_a_full_batch() -> None:
    core = scheduler(rows=1, switches=Switches(prefetch_depth=0))
    begin(core, new("base", max_tokens=60))
    core.add(new("x", "a"), 0.0)
    assert loaded(run(core)[0]) == []


def test_loads_in_flight_are_bounded() -> None:
    core = scheduler(loads=1)
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    assert loaded(run(core)[0]) == ["a"]
    assert loaded(run(core)[0]) == []
    core.loaded("a", 0.0)
    assert loaded(run(core)[0]) == ["b"]


def test_nothing_is_evicted_that_an_earlier_request_waits_for() -> None:
    core = scheduler(rows=1, arena=40, sharing=Sharing(park=False))
    begin(core, new("first", "a", max_tokens=2))
    core.add(new("base", max_tokens=60, priority=-1), 0.0)
    core.add(new("sooner", "a"), 0.0)
    core.add(new("later", "b"), 0.0)
    for _ in range(5):
        plan, _ = run(core, 1.0)
        assert evicted(plan) == []
    assert needed_sooner("b", core.waiting, core.adapter_cache) == {"a"}
    core.cancel("sooner", 1.0)
    assert evicted(run(core, 1.0)[0]) == ["a"]


def test_an_adapter_needed_later_leaves_for_one_needed_sooner() -> None:
    core = scheduler(rows=1, arena=40, sharing=Sharing(park=False))
    begin(core, new("first", "a", max_tokens=2))
    core.add(new("base", max_tokens=60, priority=-2), 0.0)
    core.add(new("later", "a"), 0.0)
    core.add(new("sooner", "b", priority=-1), 0.0)
    plans = [run(core, 1.0)[0] for _ in range(3)]
    assert [e for plan in plans for e in evicted(plan)] == ["a"]


def test_an_unused_load_is_counted_as_wasted() -> None:
    core = scheduler(arena=40)
    core.add(new("x", "a"), 0.0)
    settle(core, 0.0)
    core.cancel("x", 0.0)
    core.add(new("y", "b", max_tokens=1), 0.0)
    settle(core, 0.0)
    run(core, 0.0)
    assert core.adapter_cache.wasted == 1
    core.add(new("z", "a"), 0.0)
    assert evicted(settle(core, 0.0)[0]) == ["b"]
    assert core.adapter_cache.wasted == 1, "b was used"


def test_loads_go_by_priority_then_by_who_starved_longest() -> None:
    core = scheduler()
    order = ServiceOrder(core.waiting, core.adapter_cache, core.drainer.turns)
    for at_s, digest, priority in ((2.0, "a", 0), (1.0, "b", 0), (3.0, "c", -1)):
        core.add(new(f"for-{digest}", digest, priority=priority), at_s)
    assert list(order.digests()) == ["c", "b", "a"]
    order.check()


def test_the_order_follows_every_change() -> None:
    core = scheduler()
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 1.0)
    order = core.loads.order
    assert list(order.digests()) == ["a", "b"]
    core.cancel("x", 2.0)
    assert list(order.digests()) == ["b"]
    core.add(new("x2", "a"), 3.0)
    assert list(order.digests()) == ["b", "a"], "its starving starts again"
    assert set(loaded(run(core, 3.0)[0])) == {"a", "b"}
    assert list(order.digests()) == []
    core.load_failed("a", "broken", 3.0)
    assert list(order.digests()) == ["a"]
    order.check()


def test_loaded_ahead_counts_loading_and_unused_adapters() -> None:
    core = scheduler(rows=1)
    begin(core, new("base", max_tokens=60))
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    run(core)
    core.loaded("a", 0.0)
    assert loaded_ahead(core.adapter_cache) == 2
    core.cancel("x", 0.0)
    assert loaded_ahead(core.adapter_cache) == 1
    assert core.timelines.counts[Event.LOAD_STARTED] == 2
