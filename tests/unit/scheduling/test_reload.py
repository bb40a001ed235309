"""A load that fails is retried. Requests that have tokens wait for the retries, up to a bound."""

from cluster.errors import AdapterFailed
from cluster.values import Tier
from replica.scheduling.drainer import Drain
from replica.scheduling.loads import Switches
from replica.scheduling.request import Delta
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from tests.core import begin, loaded, new, ran, run, scheduler, settle

PARK = Sharing(quantum_s=0.5)


def failed_reload(**options: object) -> Scheduler:
    """r of adapter a was parked with 3 tokens. The reload of a has just failed, at 1.0."""
    core = scheduler(sharing=PARK, arena=40, **options)  # type: ignore[arg-type]
    begin(core, new("r", "a", max_tokens=60))
    run(core, 0.1)
    run(core, 0.2)
    core.add(new("s", "b", max_tokens=2), 0.3)
    settle(core, 0.6)
    assert list(core.running_set.parked) == ["r"]
    for now_s in (0.7, 0.8):
        run(core, now_s)
    assert loaded(run(core, 0.9)[0]) == ["a"]
    core.load_failed("a", "disk error", 1.0)
    return core


def preempted(**options: object) -> Scheduler:
    """r of adapter a has two tokens, and lost its pages and its adapter, at 0.2."""
    core = scheduler(arena=40, **options)  # type: ignore[arg-type]
    begin(core, new("r", "a", max_tokens=9))
    run(core, 0.1)
    core.in_flight.begin()
    core.running_set.preempt(core.running_set.running["r"], 0.2)
    core.adapter_cache.make_room("b", ["a"], 0.2)
    core.load_failed("b", "no file", 0.2)
    return core


def errors(deltas: list[Delta]) -> dict[str, str]:
    return {d.request_id: d.error.message for d in deltas if isinstance(d.error, AdapterFailed)}


def test_a_parked_row_waits_out_a_failed_reload_and_loses_no_token() -> None:
    core = failed_reload()
    output = list(core.running_set.parked["r"].output)
    plan, deltas = run(core, 1.0)
    assert not deltas and not loaded(plan) and plan.wake_s == 2.0
    assert not loaded(run(core, 1.9)[0])
    assert loaded(run(core, 2.0)[0]) == ["a"]
    core.loaded("a", 2.1)
    plan, _ = run(core, 2.1)
    assert ran(plan) == ["r"] and plan.rows[0].start == 6
    request = core.running_set.running["r"]
    assert request.output[:-1] == output and request.lost == 0


def test_a_request_without_tokens_fails_though_a_parked_row_waits() -> None:
    core = failed_reload()
    core.add(new("fresh", "a"), 1.1)
    _, deltas = run(core, 1.2)
    assert errors(deltas).keys() == {"fresh"} and list(core.running_set.parked) == ["r"]


def test_parked_rows_fail_with_the_reason_when_the_pause_reaches_its_longest() -> None:
    core = failed_reload()  # pauses: 1, 2, 4, then 8 s
    for retry_s in (2.0, 4.0, 8.0):
        assert not run(core, retry_s - 0.5)[1]
        assert loaded(run(core, retry_s)[0]) == ["a"]
        core.load_failed("a", "disk error", retry_s)
    _, deltas = run(core, 8.0)
    assert "disk error; retried in 8.0 s" in errors(deltas)["r"]
    assert not core.has_work


def test_others_run_and_load_while_a_parked_row_waits() -> None:
    core = failed_reload()
    core.add(new("base", max_tokens=2), 1.0)
    core.add(new("other", "c", max_tokens=2), 1.0)
    plan, _ = settle(core, 1.0)
    assert ran(plan) == ["base"] and loaded(plan) == ["c"]
    assert "other" in ran(run(core, 1.1)[0])


def test_the_first_request_blocks_no_other_while_its_adapter_waits_for_a_retry() -> None:
    core = preempted(switches=Switches(on_miss="block"))
    assert loaded(run(core, 0.2)[0]) == ["a"]
    core.load_failed("a", "disk error", 0.2)
    core.add(new("other", "c"), 0.2)
    core.add(new("base"), 0.2)
    assert loaded(run(core, 0.2)[0]) == ["c"]
    core.loaded("c", 0.3)
    assert ran(run(core, 0.3)[0]) == ["other", "base"]


def test_a_drain_for_an_adapter_ends_when_its_load_fails() -> None:
    core = failed_reload()
    begin(core, new("x", "b", max_tokens=50), now_s=1.0)
    core.drainer.drains["b"] = Drain("a", frozenset())
    core.add(new("y", "b"), 1.1)
    assert ran(run(core, 1.1)[0]) == ["x", "y"]


def test_without_overlap_a_begun_row_waits_too() -> None:
    core = preempted(sharing=Sharing(park=False), switches=Switches(overlap=False))
    core.add(new("fresh", "a"), 0.2)
    request = core.waiting.head("a")
    output = list(request.output)
    plan = core.step(0.2)
    assert ran(plan) == ["r", "fresh"] and loaded(plan) == ["a"]
    assert errors(core.lost("a", "disk error", 0.2)).keys() == {"fresh"}
    plan = core.without_ended(plan)
    core.check()
    assert not plan.rows and core.pages.free == 64
    assert not loaded(run(core, 1.1)[0])
    plan, _ = run(core, 1.2)
    assert loaded(plan) == ["a"] and ran(plan) == ["r"] and plan.rows[0].start == 0
    assert request.output[:-1] == output


def test_a_registration_ends_the_pause() -> None:
    core = failed_reload()
    assert not loaded(run(core, 1.0)[0])
    core.adapter_cache.register("a", "/a", 40, pinned=False, now_s=1.1)
    (state,) = core.adapter_cache.entries(digests=["a"])
    assert (state.tier, state.reason, state.since_s) == (Tier.DISK, None, 1.1)
    core.add(new("fresh", "a"), 1.1)
    plan, deltas = run(core, 1.1)
    assert not deltas and loaded(plan) == ["a"]
    core.load_failed("a", "still broken", 1.2)
    run(core, 1.2)
    assert core.adapter_cache.backoff.next_retry_s(core.waiting, 1.2) == 2.2, "as after the first"
