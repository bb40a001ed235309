"""What runs next, and what never waits."""

import dataclasses
from collections.abc import Callable

import pytest

from cluster.costs import Costs
from cluster.errors import (
    AdapterFailed,
    BadRequest,
    FleetError,
    LogitsNotFinite,
    ModelNotFound,
    QueueFull,
)
from cluster.values import Tier
from replica.scheduling import victims
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.extents import Extents
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Plan
from replica.scheduling.request import (
    Delta,
    Finish,
    NewRequest,
    Outputs,
    Sampled,
    Sampling,
    TokenLogprobs,
)
from replica.scheduling.scheduler import Scheduler

EOS = 2


def scheduler(
    *,
    rows: int = 8,
    tokens: int = 64,
    queue: int = 100,
    pages: int = 64,
    arena: int = 100,
    loads: int = 2,
) -> Scheduler:
    limits = Limits(rows, tokens, queue, loads, context=128, eos_tokens=frozenset({EOS}))
    adapter_cache = AdapterCache(
        Extents(arena, 1), 8, victims.lru, lambda size, _: size / 100, 1.0, 8.0
    )
    for digest in "abcd":
        adapter_cache.register(digest, f"/{digest}", 40, pinned=False, now_s=0.0)
    return Scheduler(limits, Pages(pages, 16), adapter_cache, Costs(copy_bytes_per_s=100.0))


def new(name: str, digest: str | None = None, prompt: int = 4, **sampling: object) -> NewRequest:
    fields: dict[str, object] = {"max_tokens": 4, **sampling}
    first = 1000 * sum(map(ord, name))  # no two prompts begin alike
    return NewRequest(name, tuple(range(first, first + prompt)), Sampling(**fields), digest)  # type: ignore[arg-type]


def run(
    core: Scheduler, now_s: float = 0.0, token: Callable[[str], int] = lambda _: 7
) -> tuple[Plan, list[Delta]]:
    plan = core.step(now_s)
    core.check()
    chosen = [Sampled(token(w.request.id)) if w.sample else None for w in plan.rows]
    deltas = core.commit(plan, chosen, now_s)
    core.check()
    return plan, [*plan.failed, *deltas]


def ran(plan: Plan) -> list[str]:
    return [work.request.id for work in plan.rows]


def test_a_request_is_prefilled_then_decoded_to_its_last_token() -> None:
    core = scheduler()
    core.add(new("r", prompt=5, max_tokens=3), 0.0)
    spans = []
    for _ in range(3):
        plan, deltas = run(core)
        spans += [(w.start, w.end, w.sample) for w in plan.rows]
    assert spans == [(0, 5, True), (5, 6, True), (6, 7, True)]
    assert deltas == [Delta("r", (7,), (), Finish.LENGTH)]
    assert not core.has_work and core.pages.free == 64


def test_a_long_prompt_is_cut_into_chunks_beside_decodes() -> None:
    core = scheduler(tokens=20)
    core.add(new("old", prompt=4, max_tokens=20), 0.0)
    run(core)
    core.add(new("long", prompt=50), 0.0)
    spans = []
    for _ in range(3):
        plan, _ = run(core)
        assert ran(plan) == ["old", "long"]
        spans.append((plan.rows[1].start, plan.rows[1].end, plan.rows[1].sample))
    assert spans == [(0, 19, False), (19, 38, False), (38, 50, True)]


def test_base_requests_pass_a_queue_of_cold_adapters() -> None:
    core = scheduler()
    for i, digest in enumerate("abcd"):
        core.add(new(f"cold{i}", digest), 0.0)
    core.add(new("base"), 0.0)
    plan, _ = run(core)
    assert ran(plan) == ["base"]
    assert [change.load.digest for change in plan.arena_changes] == ["a", "b"]


def test_a_warm_adapter_passes_a_cold_one() -> None:
    core = scheduler()
    core.add(new("first", "b", max_tokens=20), 0.0)
    run(core)
    core.loaded("b", 0.0)
    core.add(new("cold", "a"), 0.0)
    core.add(new("warm", "b"), 0.0)
    plan, _ = run(core)
    assert ran(plan) == ["first", "warm"]


def test_rows_carry_the_slot_of_their_own_version() -> None:
    core = scheduler()
    for name, digest in (("x", "a"), ("y", "b"), ("z", None)):
        core.add(new(name, digest, max_tokens=9), 0.0)
    plan, _ = run(core)
    slots = {change.load.digest: change.load.slot for change in plan.arena_changes}
    core.loaded("a", 0.0)
    core.loaded("b", 0.0)
    plan, _ = run(core)
    assert {w.request.id: w.slot for w in plan.rows} == {"x": slots["a"], "y": slots["b"], "z": 0}


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize(
    ("bad", "error"),
    [(Sampled(7, finite=False), LogitsNotFinite), (Sampled(7, allowed=False), BadRequest)],
)
def test_a_row_that_yields_no_token_fails_and_the_others_go_on(
    bad: Sampled, error: type[FleetError], steps_before: int
) -> None:
    core = scheduler()
    for name in ("before", "bad", "after"):
        core.add(new(name, max_tokens=2 + steps_before), 0.0)
    for _ in range(steps_before):
        run(core)
    plan = core.step(0.0)
    chosen = [bad if work.request.id == "bad" else Sampled(7) for work in plan.rows]
    deltas = {delta.request_id: delta for delta in core.commit(plan, chosen, 0.0)}
    core.check()
    assert isinstance(deltas["bad"].error, error) and deltas["bad"].tokens == ()
    assert (deltas["before"].tokens, deltas["after"].tokens) == ((7,), (7,))
    plan, _ = run(core)
    assert ran(plan) == ["before", "after"]
    assert not core.has_work and core.pages.free == 64


def test_every_token_brings_its_log_probabilities() -> None:
    core = scheduler()
    core.add(new("r", max_tokens=4, logprobs=1), 0.0)
    told = []
    while core.has_work:
        plan = core.step(0.0)
        (delta,) = core.commit(plan, [Sampled(7, TokenLogprobs(7, -float(len(told)), ()))], 0.0)
        told += [entry.logprob for entry in delta.logprobs]
    assert told == [0.0, -1.0, -2.0, -3.0]


def test_tokens_come_before_what_may_end_their_requests() -> None:
    outputs = Outputs([Delta("a", error=BadRequest("no token"))], [("a", 7), ("b", 8)])
    outputs += Outputs([Delta("c", (9,))], [("b", 9)])
    told = [(delta.request_id, delta.tokens, delta.last) for delta in outputs]
    assert told[:3] == [("a", (7,), False), ("b", (8,), False), ("b", (9,), False)]
    assert told[3:] == [("a", (), True), ("c", (9,), False)]


def test_a_prompt_that_finds_no_pages_does_not_block_a_shorter_one() -> None:
    core = scheduler(pages=4)
    core.add(new("a", prompt=33, max_tokens=9), 0.0)
    run(core)
    core.add(new("b", prompt=40, max_tokens=4), 0.0)
    core.add(new("c", prompt=10, max_tokens=4), 0.0)
    plan, _ = run(core)
    assert ran(plan) == ["a", "c"]


def test_when_pages_run_out_the_newest_recomputes_and_loses_no_token() -> None:
    core = scheduler(pages=4)
    core.add(new("old", prompt=30, max_tokens=30), 0.0)
    core.add(new("new", prompt=30, max_tokens=30), 0.0)
    got: dict[str, list[int]] = {"old": [], "new": []}
    for step in range(100):
        _, deltas = run(core, token=lambda _, step=step: 100 + step)  # type: ignore[misc]
        for delta in deltas:
            got[delta.request_id] += delta.tokens
        if not core.has_work:
            break
    assert [len(tokens) for tokens in got.values()] == [30, 30]
    assert core.pages.free == 4


def test_a_cancelled_request_frees_pages_and_adapter_at_once() -> None:
    core = scheduler(arena=40)
    core.add(new("r", "a", max_tokens=50), 0.0)
    run(core)
    core.loaded("a", 0.0)
    run(core)
    assert core.pages.free == 63
    assert core.cancel("r", 1.0)
    core.check()
    assert core.pages.free == 64
    assert not core.cancel("r", 1.0)
    core.add(new("s", "b"), 1.0)
    assert [e.digest for e in core.step(1.0).arena_changes[0].evictions] == ["a"]


def test_an_end_token_stops_unless_it_is_ignored_or_too_early() -> None:
    core = scheduler()
    core.add(new("stops", max_tokens=9), 0.0)
    core.add(new("ignores", max_tokens=9, ignore_eos=True), 0.0)
    core.add(new("early", max_tokens=9, min_tokens=3), 0.0)
    core.add(new("own", max_tokens=9, stop_tokens=frozenset({7})), 0.0)
    lengths: dict[str, int] = {}
    finishes: dict[str, Finish | None] = {}
    while core.has_work:
        _, deltas = run(core, token=lambda name: 7 if name == "own" else EOS)
        for delta in deltas:
            lengths[delta.request_id] = lengths.get(delta.request_id, 0) + len(delta.tokens)
            finishes[delta.request_id] = delta.finish
    assert lengths == {"stops": 1, "ignores": 9, "early": 4, "own": 1}
    assert finishes["ignores"] is Finish.LENGTH
    assert {finishes[name] for name in ("stops", "early", "own")} == {Finish.STOP}


def test_the_context_ends_a_request() -> None:
    core = scheduler()
    core.add(new("r", prompt=120, max_tokens=500), 0.0)
    tokens = 0
    while core.has_work:
        tokens += len(run(core)[1])
    assert tokens == 8


def test_a_failed_load_fails_its_own_requests_and_is_retried_later() -> None:
    core = scheduler()
    core.add(new("r", "a"), 0.0)
    core.add(new("base", max_tokens=50), 0.0)
    run(core)
    core.load_failed("a", "truncated file", 0.0)
    plan, deltas = run(core, 0.5)
    assert ran(plan) == ["base"]
    (failure,) = [d for d in deltas if d.error]
    assert failure.request_id == "r" and isinstance(failure.error, AdapterFailed)
    assert "truncated file" in failure.error.message
    core.add(new("again", "a"), 2.0)
    plan, deltas = run(core, 2.0)
    assert [change.load.digest for change in plan.arena_changes] == ["a"]
    assert not any(d.error for d in deltas)


def test_a_request_accepted_before_the_unload_still_runs() -> None:
    core = scheduler()
    core.add(new("r", "a", max_tokens=1), 0.0)
    core.forget("a")
    with pytest.raises(ModelNotFound):
        core.add(new("late", "a"), 0.0)
    run(core)
    core.loaded("a", 0.0)
    _, deltas = run(core)
    assert deltas[0].finish is Finish.LENGTH
    assert [e.digest for e in core.evictions()] == ["a"]
    assert "a" not in core.adapter_cache.adapters


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (new("r", prompt=128), BadRequest, "128"),
        (new("r", prompt=100, max_tokens=20), BadRequest, "8 KV pages"),
        (new("r", "unknown"), ModelNotFound, "unknown"),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    request_: NewRequest, error: type[Exception], words: str
) -> None:
    core = scheduler(pages=7)
    with pytest.raises(error, match=words):
        core.add(request_, 0.0)
    core.check()
    assert not core.has_work


def test_a_full_queue_refuses_and_keeps_nothing() -> None:
    core = scheduler(rows=1, queue=1)
    core.add(new("a"), 0.0)
    core.add(new("b"), 0.0)
    with pytest.raises(QueueFull) as raised:
        core.add(new("c", "a"), 0.0)
    assert raised.value.retry_after_s is not None
    core.check()


def test_a_pinned_adapter_is_loaded_before_any_request() -> None:
    core = scheduler()
    core.adapter_cache.register("p", "/p", 40, pinned=True, now_s=0.0)
    plan, _ = run(core)
    assert [change.load.digest for change in plan.arena_changes] == ["p"]


def test_prompts_with_a_common_prefix_share_pages_within_one_version_only() -> None:
    core = scheduler(tokens=200, arena=200)
    prompt = tuple(range(50))
    for digest in ("a", "b"):
        core.adapter_cache.register(digest, "/", 40, pinned=False, now_s=0.0)
    core.add(NewRequest("a1", prompt, Sampling(max_tokens=1), "a"), 0.0)
    core.step(0.0)
    core.loaded("a", 0.0)
    run(core)
    core.add(NewRequest("a2", prompt, Sampling(max_tokens=1), "a"), 0.0)
    core.add(NewRequest("b1", prompt, Sampling(max_tokens=1), "b"), 0.0)
    core.add(NewRequest("base", prompt, Sampling(max_tokens=1)), 0.0)
    plan, deltas = run(core)
    assert {w.request.id: w.start for w in plan.rows} == {"a2": 48, "base": 0}
    assert {d.request_id: d.cached_tokens for d in deltas} == {"a2": 48, "base": 0}
    core.loaded("b", 0.0)
    plan, _ = run(core)
    assert [(w.request.id, w.start) for w in plan.rows] == [("b1", 0)]


def test_a_prefix_outlives_its_adapter() -> None:
    core = scheduler(tokens=200)
    prompt = tuple(range(40))
    for name in ("first", "again"):
        core.adapter_cache.register("a", "/", 40, pinned=False, now_s=0.0)
        core.add(NewRequest(name, prompt, Sampling(max_tokens=1), "a"), 0.0)
        core.step(0.0)
        core.loaded("a", 0.0)
        plan, _ = run(core)
        core.forget("a")
        assert "a" not in core.adapter_cache.adapters
    assert [w.start for w in plan.rows] == [32]


def test_a_lower_priority_goes_first() -> None:
    core = scheduler(rows=1)
    for name, priority in (("first", 0), ("urgent", -2), ("soon", -1)):
        core.add(dataclasses.replace(new(name, max_tokens=1), priority=priority), 0.0)
    assert [ran(run(core)[0]) for _ in range(3)] == [["urgent"], ["soon"], ["first"]]


def test_retry_after_is_the_time_until_the_first_row_comes_free() -> None:
    core = scheduler(rows=2, queue=0)
    core.costs.stepped(0, 0.5)
    core.add(new("long", max_tokens=80), 0.0)
    core.add(new("short", max_tokens=20), 0.0)
    run(core)
    with pytest.raises(QueueFull) as raised:
        core.add(new("late"), 0.0)
    assert raised.value.retry_after_s == pytest.approx(19 * 0.5)


def test_a_batch_takes_no_more_rows_than_its_limit() -> None:
    core = scheduler(rows=2)
    for i in range(4):
        core.add(new(f"r{i}", max_tokens=2), 0.0)
    assert ran(run(core)[0]) == ["r0", "r1"]
    assert ran(run(core)[0]) == ["r0", "r1"]
    assert ran(run(core)[0]) == ["r2", "r3"]


def test_a_step_computes_no_more_tokens_than_its_limit() -> None:
    core = scheduler(tokens=20)
    for i in range(4):
        core.add(new(f"r{i}", prompt=15, max_tokens=30), 0.0)
    for _ in range(10):
        plan, _ = run(core)
        assert sum(w.end - w.start for w in plan.rows) <= 20
    assert len(core.running_set.running) == 4


def test_the_id_of_a_finished_request_can_be_reused() -> None:
    core = scheduler()
    for _ in range(2):
        core.add(new("r", max_tokens=1), 0.0)
        run(core)
    assert not core.has_work and not core.cancel("r", 0.0)


def test_arrivals_are_counted_by_the_adapters_tier() -> None:
    core = scheduler()
    core.add(new("base"), 0.0)
    core.add(new("x", "a"), 0.0)
    run(core)
    core.add(new("y", "a"), 0.0)
    core.loaded("a", 0.0)
    core.add(new("z", "a"), 0.0)
    assert core.arrivals == {Tier.DISK: 1, Tier.LOADING: 1, Tier.DEVICE: 1}


def test_the_last_page_of_a_fully_cached_prompt_is_recomputed() -> None:
    core = scheduler()
    for name in ("first", "again"):
        core.add(NewRequest(name, tuple(range(32)), Sampling(max_tokens=1)), 0.0)
        plan, _ = run(core)
    assert [(w.start, w.end, w.sample) for w in plan.rows] == [(16, 32, True)]


def test_a_load_lost_after_its_own_plan_evicted_it_again_changes_nothing() -> None:
    core = scheduler()
    core.add(new("r", "a"), 0.0)
    assert core.lost("a", "broken", 0.0) == []
    core.check()
