"""Plan n + 1 is made before step n commits, and does not reuse memory that step n references."""

import pytest

from replica.scheduling.plan import Plan
from replica.scheduling.request import Delta, Finish, NewRequest, Phase, Sampled, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import EOS, begin, evicted, loaded, new, ran, scheduler

PARK = Sharing(quantum_s=0.5)


def ahead(core: Scheduler, now_s: float = 0.0) -> Plan:
    """A plan that is launched but not committed."""
    plan = core.step(now_s)
    core.check()
    return plan


def commit(core: Scheduler, plan: Plan, token: int = 7, now_s: float = 0.0) -> list[Delta]:
    outputs = core.commit(plan, [Sampled(token) if w.sample else None for w in plan.rows], now_s)
    core.check()
    return list(outputs)


def spans(plan: Plan) -> list[tuple[str, int, int]]:
    return [(work.request.id, work.start, work.end) for work in plan.rows]


def test_a_decode_is_planned_before_its_input_token_is_known() -> None:
    core = scheduler()
    core.add(new("r", prompt=5, max_tokens=4), 0.0)
    first = ahead(core)
    second = ahead(core)
    assert (spans(first), spans(second)) == ([("r", 0, 5)], [("r", 5, 6)])
    assert [d.tokens for d in commit(core, first, 8)] == [(8,)]
    third = ahead(core)
    assert spans(third) == [("r", 6, 7)]
    assert [d.tokens for d in commit(core, second, 9)] == [(9,)]


def test_chunks_of_a_prompt_follow_each_other_in_flight() -> None:
    core = scheduler(tokens=20)
    core.add(new("r", prompt=50, max_tokens=4), 0.0)
    first = ahead(core)
    second = ahead(core)
    assert commit(core, first) == []
    assert spans(first) + spans(second) + spans(ahead(core)) == [
        ("r", 0, 20),
        ("r", 20, 40),
        ("r", 40, 50),
    ]


@pytest.mark.parametrize(("prompt", "most"), [(4, 2), (126, 50)], ids=["length", "context"])
def test_a_row_that_ends_by_length_is_not_planned_again(prompt: int, most: int) -> None:
    core = scheduler(tokens=200)
    core.add(new("r", prompt=prompt, max_tokens=most), 0.0)
    first, second = ahead(core), ahead(core)
    commit(core, first)
    assert ran(second) == ["r"] and ran(ahead(core)) == []
    (delta,) = commit(core, second)
    assert delta.finish is Finish.LENGTH
    assert not core.has_work and core.pages.free == 64


def test_the_row_after_a_stop_token_is_wasted_and_holds_its_pages_until_it_commits() -> None:
    core = scheduler()
    core.add(new("r", prompt=16, max_tokens=9), 0.0)
    first, second = ahead(core), ahead(core)
    (delta,) = commit(core, first, EOS)
    assert delta.finish is Finish.STOP and delta.tokens == (EOS,)
    assert ran(second) == ["r"] and core.pages.free == 62
    assert core.has_work, "the wasted row has not committed yet"
    assert ran(ahead(core)) == []
    assert commit(core, second) == []
    assert core.pages.free == 64 and not core.has_work


def test_a_cancelled_request_keeps_its_pages_until_the_last_step_with_its_row_commits() -> None:
    core = scheduler()
    core.add(new("r", max_tokens=9), 0.0)
    first, second = ahead(core), ahead(core)
    assert core.cancel("r", 0.0) and not core.cancel("r", 0.0)
    core.check()
    assert commit(core, first) == []
    assert core.pages.free == 63
    assert commit(core, second) == []
    assert core.pages.free == 64


def test_an_id_can_be_reused_while_a_step_references_its_ended_request() -> None:
    core = scheduler()
    core.add(new("r", max_tokens=9), 0.0)
    first = ahead(core)
    core.cancel("r", 0.0)
    core.add(new("r", prompt=6, max_tokens=1), 0.0)
    second = ahead(core)
    assert commit(core, first, 8) == []
    (delta,) = commit(core, second, 9)
    assert delta.tokens == (9,) and delta.finish is Finish.LENGTH


def test_a_forgotten_adapter_leaves_when_the_last_step_with_its_rows_has_committed() -> None:
    core = scheduler()
    begin(core, new("r", "a", max_tokens=50))
    plan = ahead(core)
    core.forget("a")
    core.cancel("r", 0.0)
    core.check()
    assert core.evictions() == [] and core.adapter_cache.usable("a")
    commit(core, plan)
    assert [e.digest for e in core.evictions()] == ["a"]
    assert "a" not in core.adapter_cache.adapters


def test_a_plan_that_evicts_an_adapter_in_flight_waits() -> None:
    core = scheduler(arena=40)
    begin(core, new("r", "a", max_tokens=50))
    plan = ahead(core)
    core.cancel("r", 0.0)
    core.add(new("s", "b"), 0.0)
    following = ahead(core)
    assert evicted(following) == ["a"] and loaded(following) == ["b"]
    assert following.waits
    commit(core, plan)
    assert not ahead(core).waits


def test_an_idle_adapter_without_rows_in_flight_leaves_at_once() -> None:
    core = scheduler(arena=80)
    begin(core, new("r", "a", max_tokens=50), new("idle", "b", max_tokens=50))
    core.cancel("idle", 0.0)
    ahead(core)
    core.add(new("s", "c"), 0.0)
    following = ahead(core)
    assert evicted(following) == ["b"] and not following.waits


def test_a_plan_that_slides_images_waits() -> None:
    core = scheduler(arena=100, sizes={"a": 30, "b": 40, "c": 30, "d": 50})
    for digest in "abc":
        begin(core, new(digest, digest, max_tokens=50))
    core.cancel("a", 0.0)
    core.cancel("c", 0.0)
    plan = ahead(core)
    assert ran(plan) == ["b"]
    core.add(new("d", "d"), 0.0)
    following = ahead(core)
    assert [move.bytes for change in following.arena_changes for move in change.slides] == [40]
    assert following.waits


def test_a_row_parked_in_flight_keeps_its_token_and_recomputes_nothing() -> None:
    core = scheduler(arena=40, sharing=PARK)
    begin(core, new("r", "a", max_tokens=200))
    plan = ahead(core)
    computed = plan.rows[0].end
    core.add(new("s", "b", max_tokens=1), 5.0)
    following = ahead(core, 5.0)
    assert "r" in core.running_set.parked and evicted(following) == ["a"] and following.waits
    (delta,) = commit(core, plan, 8, 5.0)
    assert delta.tokens == (8,) and core.running_set.parked["r"].output[-1] == 8
    core.loaded("b", 5.0)
    commit(core, ahead(core, 5.0), now_s=5.0)
    back = ahead(core, 6.0)
    core.loaded("a", 6.0)
    assert loaded(back) == ["a"]
    assert spans(ahead(core, 6.0)) == [("r", computed, computed + 1)]


def test_a_parked_request_may_end_in_flight() -> None:
    core = scheduler(arena=40, sharing=PARK)
    begin(core, new("r", "a", max_tokens=200))
    plan = ahead(core)
    request = plan.rows[0].request
    core.add(new("s", "b"), 5.0)
    ahead(core, 5.0)
    assert request.phase is Phase.PARKED
    (delta,) = commit(core, plan, EOS, 5.0)
    assert delta.finish is Finish.STOP and request.phase is Phase.FINISHED
    assert core.pages.free == 64 and not core.running_set.parked


def test_a_plan_that_preempts_a_row_in_flight_waits() -> None:
    core = scheduler(pages=4)
    core.add(new("old", prompt=30, max_tokens=30), 0.0)
    core.add(new("new", prompt=30, max_tokens=30), 0.0)
    plan, following = ahead(core), ahead(core)
    while "new" in ran(following):
        commit(core, plan, 8)
        plan, following = following, ahead(core)
    assert ran(plan) == ["old", "new"] and ran(following) == ["old"]
    assert following.waits
    deltas = commit(core, plan, 9)
    assert {d.request_id: d.tokens for d in deltas} == {"old": (9,), "new": (9,)}
    (waiting,) = core.waiting
    assert waiting.id == "new" and waiting.output[-1] == 9 and waiting.computed == 0


def test_a_request_that_left_the_batch_is_not_admitted_by_the_same_plan() -> None:
    """Not even if a later preemption leaves enough pages: its token is not known yet."""
    core = scheduler(pages=8, tokens=200)
    for name, prompt in (("a", 31), ("b", 31), ("large", 40), ("small", 4)):
        core.add(new(name, prompt=prompt, max_tokens=30), 0.0)
    plan, following = ahead(core), ahead(core)
    commit(core, plan)
    plan, following = following, ahead(core)
    assert ran(following) == ["a", "b"] and following.waits
    assert {request.id for request in core.waiting} == {"large", "small"} and core.pages.free > 0
    commit(core, plan)
    assert spans(ahead(core))[-1] == ("small", 0, 6)


def test_a_prefix_is_found_after_its_step_has_committed() -> None:
    core = scheduler(tokens=200)
    prompt = tuple(range(40))
    core.add(NewRequest("first", prompt, Sampling(max_tokens=9)), 0.0)
    first = ahead(core)
    core.add(NewRequest("soon", prompt, Sampling(max_tokens=9)), 0.0)
    second = ahead(core)
    assert spans(second)[-1] == ("soon", 0, 40)
    commit(core, first)
    core.add(NewRequest("late", prompt, Sampling(max_tokens=9)), 0.0)
    assert spans(ahead(core))[-1] == ("late", 32, 40)


def test_a_prompt_whose_logprobs_are_wanted_is_computed_though_it_is_cached() -> None:
    core = scheduler(tokens=200)
    prompt = tuple(range(40))
    core.add(NewRequest("first", prompt, Sampling(max_tokens=9)), 0.0)
    commit(core, ahead(core))
    for name, sampling, start in (
        ("scored", Sampling(max_tokens=9, prompt_logprobs=0), 0),
        ("embedded", Sampling(max_tokens=9, embeds=True), 32),
    ):
        core.add(NewRequest(name, prompt, sampling), 0.0)
        plan = ahead(core)
        assert spans(plan)[-1] == (name, start, 40)
        (*_, delta) = commit(core, plan)
        assert delta.cached_tokens == start


def test_dropped_rows_are_planned_again() -> None:
    core = scheduler()
    core.add(new("decodes", max_tokens=9), 0.0)
    first = ahead(core)
    core.add(new("comes", prompt=6), 0.0)
    second = ahead(core)
    assert spans(second) == [("decodes", 4, 5), ("comes", 0, 6)]
    second = core.without(second, lambda work: work.request.id == "decodes")
    core.check()
    commit(core, first)
    assert spans(ahead(core)) == [("decodes", 4, 5), ("comes", 6, 7)]
    commit(core, second)


def test_rows_whose_request_ended_before_the_launch_are_dropped() -> None:
    core = scheduler()
    core.add(new("r", max_tokens=9), 0.0)
    first, second = ahead(core), ahead(core)
    commit(core, first, EOS)
    second = core.without_ended(second)
    core.check()
    assert second.rows == () and core.pages.free == 64 and not core.has_work


def test_a_third_step_is_not_planned_before_the_first_has_committed() -> None:
    core = scheduler()
    core.add(new("r", max_tokens=9), 0.0)
    ahead(core)
    ahead(core)
    with pytest.raises(AssertionError, match="too far ahead"):
        core.step(0.0)


def test_steps_commit_in_the_order_of_their_plans() -> None:
    core = scheduler()
    core.add(new("r", max_tokens=9), 0.0)
    ahead(core)
    second = ahead(core)
    with pytest.raises(AssertionError, match="in the order"):
        commit(core, second)
    core.check()


def test_no_step_is_planned_while_a_plan_waits() -> None:
    core = scheduler(arena=40, sharing=PARK)
    begin(core, new("r", "a", max_tokens=200))
    ahead(core)
    core.add(new("s", "b"), 5.0)
    assert ahead(core, 5.0).waits
    with pytest.raises(AssertionError, match="still waits"):
        core.step(5.0)
