"""Adapters take turns where that lets requests meet their targets; else what is begun is finished.

A step takes 50 ms, a copy 10 ms, and a turn 0.52 s: a slice and two copies. An adapter is overdue
after three turns of all that wait, or after thirty if all its requests have tokens.
"""

import pytest

from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import begin, loaded, new, run, scheduler, settle

# Rows on time need a place for a quarter of the time.
LOOSE = Sharing(quantum_s=0.5, ttft_target_s=1.0, tpot_target_s=0.2)
# Rows on time need a place for 0.8 of the time.
TIGHT = Sharing(quantum_s=0.5, ttft_target_s=1.0, tpot_target_s=0.05)


def one_place(sharing: Sharing, rows: int = 1, tokens: int = 100, late: bool = False) -> Scheduler:
    """`a` has the only place, and so many rows that began at 0. late: they missed the target."""
    core = scheduler(sharing=sharing, arena=40, rows=16, pages=200, context=256)
    begin(core, *(new(f"x{i}", "a", max_tokens=tokens) for i in range(rows)))
    if late:
        for request in core.running_set.running.values():
            request.first_s = request.arrived_s + 2.0
    return core


def loads_by(core: Scheduler, until_s: float, since_s: float = 0.0) -> list[str]:
    """What is loaded in steps 50 ms apart, none of which yields a token."""
    found = []
    for step in range(round((until_s - since_s) / 0.05) + 1):
        plan = core.step(since_s + step * 0.05)
        found += loaded(plan)
        for digest in loaded(plan):
            core.loaded(digest, since_s + step * 0.05)
        core.without(plan, lambda _: True)
        core.check()
    return found


def test_an_adapter_whose_duty_fits_takes_a_turn_once_the_slice_is_over() -> None:
    core = one_place(LOOSE)
    core.add(new("y", "b", max_tokens=100), 0.0)
    assert loads_by(core, 0.45) == []
    assert loads_by(core, 0.55, since_s=0.5) == ["b"]


def test_an_adapter_that_does_not_fit_waits_until_it_is_overdue() -> None:
    core = one_place(TIGHT)
    core.add(new("y", "b", max_tokens=100), 0.0)
    assert loads_by(core, 1.55) == []
    assert loads_by(core, 1.6, since_s=1.6) == ["b"]


def test_a_place_with_many_rows_behind_it_is_not_taken_for_one_request() -> None:
    """Alone, the one request would be funded first, for it has less left."""
    core = one_place(TIGHT, rows=8)
    core.add(new("y", "b", max_tokens=60), 0.0)
    assert loads_by(core, 1.55) == []
    core = one_place(TIGHT)
    core.add(new("y", "b", max_tokens=60), 0.0)
    assert loads_by(core, 0.55) == ["b"]


def test_many_requests_take_the_place_of_one_row() -> None:
    core = one_place(TIGHT)
    for i in range(8):
        core.add(new(f"y{i}", "b", max_tokens=100), 0.0)
    assert loads_by(core, 0.55) == ["b"]


@pytest.mark.parametrize(("tokens", "waits"), [(40, False), (60, True)])
def test_a_late_adapter_takes_a_place_only_if_it_ends_requests_far_faster(
    tokens: int, waits: bool
) -> None:
    core = one_place(LOOSE, late=True)
    core.add(new("y", "b", max_tokens=tokens), -2.0)  # it has missed its first target too
    core.adapter_cache.adapters["b"].starved_s = 0.0
    assert loads_by(core, 1.5) == ([] if waits else ["b"])


def test_a_late_row_that_ends_soon_keeps_its_place_from_a_new_request() -> None:
    """Else what is begun would never be finished."""
    core = one_place(LOOSE, tokens=40, late=True)
    core.add(new("y", "b", max_tokens=100), 0.0)
    assert loads_by(core, 0.9) == []


def test_rows_that_began_are_overdue_much_later() -> None:
    core = one_place(LOOSE, late=True)
    core.add(new("y", "b", max_tokens=100), -5.0)
    waiting = core.waiting.head("b")
    core.waiting.remove(waiting)
    waiting.output.append(7)
    waiting.tokens += 1
    waiting.first_s = 0.0
    core.waiting.add(waiting)
    core.adapter_cache.adapters["b"].starved_s = 0.0
    turns = core.drainer.turns
    for now_s, overdue in ((1.6, False), (15.5, False), (15.7, True)):
        turns.in_order(["b"], parks=True, now_s=now_s)
        assert turns.overdue("b") is overdue


def test_a_late_adapter_does_not_take_the_place_of_one_that_would_be_late() -> None:
    core = one_place(TIGHT)
    core.add(new("y", "b", max_tokens=4), -2.0)
    core.adapter_cache.adapters["b"].starved_s = 0.0
    assert loads_by(core, 1.0) == []


def test_a_row_far_ahead_of_its_target_gives_its_place_up() -> None:
    core = one_place(LOOSE)
    core.add(new("y", "b", max_tokens=4), -2.0)
    core.adapter_cache.adapters["b"].starved_s = 0.0
    assert loads_by(core, 0.55) == ["b"]


def test_rows_that_miss_the_first_target_are_late() -> None:
    core = one_place(TIGHT, late=True)
    core.add(new("y", "b", max_tokens=90), 0.0)
    assert loads_by(core, 0.55) == ["b"]


def test_a_new_request_makes_its_adapter_pressing_at_once() -> None:
    core = one_place(LOOSE, late=True)
    core.add(new("y", "b", max_tokens=100), -2.0)
    core.adapter_cache.adapters["b"].starved_s = 0.0
    assert loads_by(core, 0.55) == []
    core.add(new("new", "b", max_tokens=100), 0.6)
    assert loads_by(core, 0.6, since_s=0.6) == ["b"]


def test_what_clients_allow_counts_only_up_to_what_they_usually_get() -> None:
    """Else a row with a high `max_tokens` could be parked for long, and end late."""
    core = one_place(LOOSE, tokens=200)
    turns, left = core.drainer.turns, core.running_set.running["x0"].remaining
    core.add(new("y", "b", max_tokens=200), 0.0)
    turns.in_order(["b"], parks=True, now_s=0.0)
    assert turns.standing("a").work_s == pytest.approx(left * 0.05)
    for _ in range(100):
        core.growth.ended(10)
    turns.in_order(["b"], parks=True, now_s=1.0)
    assert turns.standing("a").work_s == pytest.approx(20 * 0.05, rel=0.01)
    assert turns.standing("a").late_s < 4.0


def test_the_overdue_go_first_then_the_pressing_then_who_waited_longest() -> None:
    core = scheduler(
        sharing=LOOSE, arena=40, rows=16, pages=200, context=256, sizes=dict.fromkeys("abcdef", 40)
    )
    begin(core, new("x", "a", max_tokens=100))
    core.add(new("long", "b", max_tokens=100), 0.0)
    core.add(new("short", "c", max_tokens=50), 0.0)
    core.add(new("new", "d", max_tokens=100), 4.9)
    core.add(new("newer", "f", max_tokens=50), 4.95)
    core.add(new("first", "e", max_tokens=100), -5.0)
    turns = core.drainer.turns
    starving = list(core.loads.order.digests())
    assert starving == ["e", "b", "c", "d", "f"]
    assert turns.in_order(starving, parks=True, now_s=5.0) == ["e", "d", "f", "b", "c"]
    assert turns.in_order(starving, parks=False, now_s=5.0) == starving
    assert turns.in_order(starving, parks=True, now_s=20.0) == ["e", "b", "c", "d", "f"]


def test_while_prompts_pile_up_who_starved_longest_goes_first() -> None:
    core = scheduler(sharing=LOOSE, arena=40, pages=400, context=1200, tokens=16)
    begin(core, new("x", "a", max_tokens=100))
    core.add(new("base", prompt=1100, max_tokens=4), 0.0)
    core.add(new("base2", prompt=1100, max_tokens=4), 0.0)
    core.add(new("late", "b", max_tokens=100), -2.0)
    core.add(new("new", "c", max_tokens=4), 0.0)
    core.cancel("x", 0.0)
    run(core, 0.0)
    assert loaded(settle(core, 0.1)[0]) == [] or core.adapter_cache.usable("b")
    assert not core.adapter_cache.usable("c")


@pytest.mark.parametrize(("copy_bytes_per_s", "fits"), [(4000.0, True), (400.0, False)])
def test_while_a_place_is_loaded_nobody_uses_it(copy_bytes_per_s: float, fits: bool) -> None:
    """Two duties make 0.95 if copies take no time. Those of 0.1 s take a tenth of each turn."""
    sharing = Sharing(quantum_s=0.5, ttft_target_s=1.0, tpot_target_s=0.125)
    core = scheduler(
        sharing=sharing, arena=40, pages=200, context=256, copy_bytes_per_s=copy_bytes_per_s
    )
    begin(core, new("x", "a", max_tokens=100))
    core.add(new("y", "b", max_tokens=100), 0.0)
    turns = core.drainer.turns
    turns.in_order(["b"], parks=True, now_s=0.0)
    assert (turns.standing("a").duty + turns.standing("b").duty <= 1.0) is fits
    assert turns.pressing("b") is fits
