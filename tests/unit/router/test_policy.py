"""The routing policy: which replica gets a request."""

import dataclasses

import pytest

from cluster.values import Tier
from router.policy import Candidate, RoutingWeights, load_s, queue_s, rank

MIB = 2**20
WEIGHTS = RoutingWeights()


def first(*candidates: Candidate, key: str = "fr") -> str:
    return rank(candidates, key, WEIGHTS)[0].replica_id


def test_the_replica_that_holds_the_adapter_comes_first() -> None:
    assert first(Candidate("a", tier=Tier.ABSENT), Candidate("b", tier=Tier.DEVICE)) == "b"


@pytest.mark.parametrize("tier", [Tier.LOADING, Tier.HOST, Tier.DISK, Tier.ABSENT, Tier.FAILED])
def test_no_tier_beats_device(tier: Tier) -> None:
    assert load_s(Candidate("a", tier=tier), WEIGHTS) > load_s(Candidate("b"), WEIGHTS) == 0.0


def test_a_loading_adapter_comes_before_an_absent_one() -> None:
    assert first(Candidate("a", tier=Tier.ABSENT), Candidate("b", tier=Tier.LOADING)) == "b"


def test_a_base_request_goes_to_the_replica_with_the_least_work() -> None:
    assert first(Candidate("a", requests=3), Candidate("b", requests=2)) == "b"


def test_prompt_tokens_in_the_queue_count_as_work() -> None:
    assert first(Candidate("a", queued_tokens=4000), Candidate("b", queued_tokens=100)) == "b"


def test_slow_steps_make_the_same_queue_a_longer_wait() -> None:
    slow = Candidate("a", requests=4, step_s=0.05)
    fast = Candidate("b", requests=4, step_s=0.01)
    assert first(slow, fast) == "b"


def test_a_hot_adapter_spills_when_its_holder_is_much_busier() -> None:
    holder = Candidate("a", requests=40, queued_tokens=8000, step_s=0.05)
    idle = Candidate("b", tier=Tier.ABSENT, step_s=0.05, free_bytes=64 * MIB, image_bytes=8 * MIB)
    assert first(holder, idle) == "b"


def test_a_little_more_work_does_not_make_it_spill() -> None:
    holder = Candidate("a", requests=2, step_s=0.02)
    idle = Candidate("b", tier=Tier.ABSENT, step_s=0.02, free_bytes=64 * MIB, image_bytes=8 * MIB)
    assert first(holder, idle) == "a"


def test_a_large_adapter_spills_later_than_a_small_one() -> None:
    def spills(image_bytes: int) -> bool:
        holder = Candidate("a", requests=60, step_s=0.02, image_bytes=image_bytes)
        idle = Candidate("b", tier=Tier.ABSENT, free_bytes=2**34, image_bytes=image_bytes)
        return first(holder, idle) == "b"

    assert spills(8 * MIB)
    assert not spills(1024 * MIB)


def test_a_load_from_host_memory_costs_what_such_loads_took() -> None:
    on_disk = Candidate("a", tier=Tier.DISK, image_bytes=84 * MIB, copy_bytes_per_s=1e9)
    in_host = dataclasses.replace(on_disk, replica_id="b", tier=Tier.HOST, host_bytes_per_s=25e9)
    on_disk = dataclasses.replace(on_disk, free_bytes=1024 * MIB, host_bytes_per_s=25e9)
    assert load_s(on_disk, WEIGHTS) == pytest.approx(84 * MIB / 1e9)
    assert load_s(in_host, WEIGHTS) == pytest.approx(2 * 84 * MIB / 25e9), "one must leave"
    assert first(on_disk, in_host) == "b"


def test_a_load_that_must_evict_costs_more() -> None:
    full = Candidate("a", tier=Tier.ABSENT, image_bytes=8 * MIB, free_bytes=0)
    roomy = Candidate("b", tier=Tier.ABSENT, image_bytes=8 * MIB, free_bytes=64 * MIB)
    assert first(full, roomy) == "b"


def test_a_failed_load_is_avoided_while_others_can_serve() -> None:
    failed = Candidate("a", tier=Tier.FAILED)
    busy = Candidate("b", tier=Tier.ABSENT, requests=64, step_s=0.05)
    assert first(failed, busy) == "b"


def test_a_replica_without_a_report_comes_last() -> None:
    silent = Candidate("a", known=False)
    busy = Candidate("b", requests=64, queued_tokens=10**6)
    assert [c.replica_id for c in rank([silent, busy], "fr", WEIGHTS)] == ["b", "a"]


def test_ties_do_not_depend_on_the_order_of_the_candidates() -> None:
    candidates = [Candidate(name) for name in "abcd"]
    one = [c.replica_id for c in rank(candidates, "fr", WEIGHTS)]
    other = [c.replica_id for c in rank(candidates[::-1], "fr", WEIGHTS)]
    assert one == other


def test_ties_spread_over_the_replicas_by_adapter() -> None:
    firsts = [first(*map(Candidate, "abcd"), key=f"adapter-{i}") for i in range(400)]
    assert all(60 < firsts.count(name) < 140 for name in "abcd")


def test_a_replica_that_leaves_moves_only_its_own_adapters() -> None:
    for i in range(100):
        before = first(*map(Candidate, "abcd"), key=f"adapter-{i}")
        after = first(*map(Candidate, "abc"), key=f"adapter-{i}")
        assert after == before or before == "d"


def test_no_candidates() -> None:
    assert rank([], "fr", WEIGHTS) == []


def test_an_idle_replica_has_no_wait() -> None:
    assert queue_s(Candidate("a", step_s=0.1), WEIGHTS) == 0.0


@pytest.mark.parametrize("unusable", [{"stalled": True}, {"full": True}])
def test_a_replica_that_would_keep_or_refuse_the_request_comes_after_all_that_serve(
    unusable: dict[str, bool],
) -> None:
    holder = Candidate("a", **unusable)
    busy = Candidate("b", tier=Tier.ABSENT, requests=64, queued_tokens=10**6)
    assert [c.replica_id for c in rank([holder, busy], "fr", WEIGHTS)] == ["b", "a"]


def test_of_those_that_cannot_serve_now_a_full_one_comes_before_one_that_is_not_there() -> None:
    candidates = [Candidate("a", known=False), Candidate("b", stalled=True)]
    candidates.append(Candidate("c", full=True))
    assert [c.replica_id for c in rank(candidates, "fr", WEIGHTS)] == ["c", "b", "a"]


def test_a_silent_engine_is_avoided_before_it_is_known_to_hang() -> None:
    silent = Candidate("a", silent_s=2.0)
    loading = Candidate("b", tier=Tier.ABSENT, requests=20, free_bytes=64 * MIB)
    assert first(silent, loading) == "b"


def test_a_slow_replica_elsewhere_does_not_keep_a_hot_adapter_where_it_is() -> None:
    """The margin is of the steps that the request would wait for."""
    holder = Candidate("a", requests=100, step_s=0.02)
    idle = Candidate("b", tier=Tier.ABSENT, step_s=0.02, free_bytes=64 * MIB, image_bytes=8 * MIB)
    slow = Candidate("c", tier=Tier.ABSENT, step_s=1.0)
    assert first(holder, idle) == first(holder, idle, slow) == "b"


IDLE = Candidate("b", tier=Tier.ABSENT, step_s=0.02, free_bytes=64 * MIB, image_bytes=8 * MIB)


def test_a_slow_replica_loses_what_it_holds_even_if_it_is_idle() -> None:
    assert first(Candidate("a", step_s=0.2), IDLE) == "b"
    assert first(Candidate("a", step_s=0.08), IDLE) == "a", "not that slow"


def test_short_steps_that_vary_make_no_replica_slow() -> None:
    idle = dataclasses.replace(IDLE, step_s=0.002)
    assert first(Candidate("a", step_s=0.04), idle) == "a"
    assert first(Candidate("a", step_s=0.06), idle) == "b"


def test_a_slow_replica_gets_no_base_request_while_the_others_have_little_to_do() -> None:
    slow = Candidate("a", step_s=0.2)
    for key in map(str, range(20)):
        assert first(slow, Candidate("b", step_s=0.02), key=key) == "b"
        assert first(slow, Candidate("b", step_s=0.02, requests=34), key=key) == "b"


def test_a_slow_replica_is_asked_again_when_the_others_are_busy() -> None:
    assert first(Candidate("a", step_s=0.2), Candidate("b", step_s=0.02, requests=35)) == "a"


def test_an_adapter_leaves_a_holder_that_is_ten_times_slower_at_a_few_requests() -> None:
    assert first(Candidate("a", requests=4, step_s=0.2), IDLE) == "b"
