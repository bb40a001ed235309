"""Adapters share the rows of the batch by virtual token counters."""

import pytest

from replica.scheduling.request import NewRequest, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.share import Share
from tests.core import begin, new, ran, run, scheduler


def both_resident(share: Share, rows: int = 1) -> Scheduler:
    core = scheduler(share=share, rows=2)
    begin(core, new("x", "a", max_tokens=2), new("y", "b", max_tokens=2))
    while core.has_work:
        run(core)
    core.running_set.rows_max = rows
    return core


def first_tokens(core: Scheduler, steps: int) -> list[str]:
    """Adapters in the order in which their requests got a row."""
    order = []
    for _ in range(steps):
        plan, _ = run(core)
        order += [w.request.digest or "base" for w in plan.rows if w.start == 0]
    return order


def test_switched_off_only_arrival_counts() -> None:
    core = both_resident(Share(on=False))
    for i in range(4):
        core.add(new(f"busy{i}", "a", max_tokens=1), 0.0)
    core.add(new("rare", "b", max_tokens=1), 0.0)
    assert first_tokens(core, 5) == ["a", "a", "a", "a", "b"]


def test_a_busy_tenant_does_not_starve_another() -> None:
    core = both_resident(Share(on=True))
    for i in range(20):
        core.add(new(f"busy{i}", "a", max_tokens=1), 0.0)
    for i in range(3):
        core.add(new(f"rare{i}", "b", max_tokens=1), 0.0)
    assert first_tokens(core, 6).count("b") == 3


def test_twice_the_weight_gets_twice_as_much() -> None:
    core = both_resident(Share({"a": 2.0}, on=True))
    for i in range(40):
        core.add(new(f"p{i}", "a", max_tokens=1), 0.0)
        core.add(new(f"q{i}", "b", max_tokens=1), 0.0)
    order = first_tokens(core, 30)
    assert order.count("a") == pytest.approx(20, abs=1)


def test_an_adapter_that_was_away_saves_nothing_up() -> None:
    share = Share(on=True)
    core = both_resident(share)
    for i in range(30):
        core.add(new(f"busy{i}", "a", max_tokens=1), 0.0)
    first_tokens(core, 20)
    for i in range(10):
        core.add(new(f"back{i}", "b", max_tokens=1), 0.0)
    order = first_tokens(core, 10)
    assert 4 <= order.count("b") <= 6, "in turn from now on, not all at once"


def test_tokens_served_to_an_adapter_alone_do_not_count_against_it() -> None:
    core = both_resident(Share(on=True))
    for i in range(30):
        core.add(new(f"alone{i}", "a", max_tokens=1), 0.0)
    first_tokens(core, 31)
    assert not core.has_work
    for i in range(20):
        core.add(new(f"new{i}", "b", max_tokens=1), 0.0)
        core.add(new(f"back{i}", "a", max_tokens=1), 0.0)
    order = first_tokens(core, 10)
    assert 4 <= order.count("a") <= 6, "in turn from now on"


def test_a_prompt_counts_by_its_tokens() -> None:
    share = Share(on=True)
    share.enter("a")
    share.enter("b")
    share.served("a", 100, sampled=False)
    share.served("b", 1, sampled=True)
    assert share.of("a") == 100.0 and share.of("b") == 3.0


def test_each_token_of_an_output_counts() -> None:
    share = Share(on=True)
    core = scheduler(share=share)
    begin(core, new("x", "a", prompt=4, max_tokens=30))
    while core.has_work:
        run(core)
    assert share.of("a") == (4 + 29) + 30 * 2.0, "tokens computed, and twice those chosen"


def test_a_new_adapter_starts_at_the_lowest_counter_present() -> None:
    share = Share(on=True)
    share.enter("a")
    share.served("a", 50, sampled=False)
    share.enter("b")
    assert share.of("b") == 50.0
    share.leave("a")
    share.served("b", 10, sampled=False)
    share.enter("c")
    assert share.of("c") == 60.0


def test_a_weight_may_change_and_is_forgotten_with_the_last_request() -> None:
    share = Share(on=True)
    share.weigh("a", 4.0)
    share.enter("a")
    share.served("a", 100, sampled=False)
    assert share.of("a") == 25.0
    share.weigh("a", 2.0)
    share.served("a", 100, sampled=False)
    assert share.of("a") == 75.0
    share.forget("a")
    share.served("a", 100, sampled=False)
    assert share.of("a") == 125.0, "a request that was accepted keeps its weight"
    share.leave("a")
    assert share.of("a") == 0.0
    share.enter("a")
    share.served("a", 100, sampled=False)
    assert share.of("a") == 225.0


def test_an_adapter_registered_again_in_time_keeps_its_weight() -> None:
    share = Share(on=True)
    share.weigh("a", 4.0)
    share.enter("a")
    share.forget("a")
    share.weigh("a", 4.0)
    share.leave("a")
    share.served("a", 100, sampled=False)
    assert share.of("a") == 25.0


def test_a_forgotten_adapters_counter_goes_with_its_last_request() -> None:
    core = both_resident(Share({"a": 2.0}, on=True))
    core.add(new("last", "a", max_tokens=1), 0.0)
    core.forget("a")
    before = core.share.of("a")
    run(core)
    assert not core.has_work and before > 0.0
    assert core.share.of("a") == 0.0


def test_priority_goes_before_share() -> None:
    core = both_resident(Share(on=True))
    core.share.served("a", 1000, sampled=False)
    core.add(new("low", "b", max_tokens=1), 0.0)
    core.add(NewRequest("high", (1, 2), Sampling(max_tokens=1), "a", priority=-1), 0.0)
    plan, _ = run(core)
    assert ran(plan) == ["high"]
