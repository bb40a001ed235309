"""The routing policy: which replica gets a request."""

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
