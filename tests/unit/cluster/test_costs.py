"""Rates start from a prior, which measurements replace."""

import pytest

from cluster.costs import Costs, Smoothed
from cluster.values import Tier


def test_the_first_measurement_replaces_the_prior() -> None:
    costs = Costs(copy_bytes_per_s=1.0)
    costs.copied(1000, Tier.DISK, 2.0)
    assert costs.copy_s(500) == pytest.approx(1.0)


def test_later_ones_move_it_by_a_tenth() -> None:
    average = Smoothed(9.0)
    for measured in (1.0, 2.0, 3.0):
        average.take_in(measured)
    assert average.value == pytest.approx(2.0)
    for _ in range(10):
        average.take_in(2.0)
    average.take_in(12.0)
    assert average.value == pytest.approx(3.0)


def test_one_slow_copy_does_not_make_all_slow() -> None:
    costs = Costs()
    for _ in range(20):
        costs.copied(1000, Tier.DISK, 1.0)
    costs.copied(1000, Tier.DISK, 10.0)
    assert costs.copy_s(1000) < 2.0


def test_each_tier_has_its_rate_and_stands_in_for_the_other_until_measured() -> None:
    costs = Costs(copy_bytes_per_s=1.0)
    costs.copied(1000, Tier.HOST, 1.0)
    assert costs.copy_s(1000, Tier.DISK) == pytest.approx(1.0)
    costs.copied(1000, Tier.DISK, 4.0)
    assert costs.copy_s(1000, Tier.DISK) == pytest.approx(4.0)
    assert costs.copy_s(1000, Tier.HOST) == pytest.approx(1.0)
    assert (costs.copy_bytes_per_s, costs.host_bytes_per_s) == pytest.approx((250.0, 1000.0))


def test_a_prefill_is_what_a_step_took_beyond_a_decode() -> None:
    costs = Costs()
    costs.stepped(0, 0.02)
    costs.stepped(100, 0.12)
    assert costs.decode_s == pytest.approx(0.02)
    assert costs.prefill_s(100) == pytest.approx(0.12)


def test_a_prompt_is_not_cheap_because_no_decode_step_was_measured() -> None:
    costs = Costs(decode_s=0.02)
    costs.stepped(96, 0.008)  # of 0.002 a decode step
    assert costs.prefill_s(960) >= 0.06


def test_nothing_is_learned_from_an_empty_image_and_nothing_becomes_free() -> None:
    costs = Costs(copy_bytes_per_s=100.0)
    costs.copied(0, Tier.DISK, 5.0)
    assert costs.copy_s(100) == pytest.approx(1.0)
    costs.stepped(10, 0.001)  # faster than the estimate of a decode step
    assert costs.prefill_s(10) > costs.decode_s


def test_a_page_copy_that_was_held_up_changes_its_estimate_little() -> None:
    costs = Costs()
    assert costs.page_copy_s(100) == 0, "free until measured"
    costs.pages_copied(100, 1.0)
    costs.pages_copied(100, 1000.0)
    assert costs.page_copy_s(100) <= 2.5
    before_s = costs.page_copy_s(100)
    costs.page_copy_declined()
    assert 0 < costs.page_copy_s(100) < before_s
