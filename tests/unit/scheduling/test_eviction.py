"""Eviction order: adapters that no request waits for first, then each order's own measure."""

import random

import pytest

from replica.scheduling.victims import ORDERS, Candidate, EvictionOrder, cost, fifo, lru


def candidate(digest: str, placed: float, used: float, value: float, wanted: bool) -> Candidate:
    return Candidate(digest, placed, used, wanted, value)


OLD = candidate("old", placed=1.0, used=9.0, value=5.0, wanted=False)
STALE = candidate("stale", placed=2.0, used=3.0, value=4.0, wanted=False)
CHEAP = candidate("cheap", placed=3.0, used=8.0, value=1.0, wanted=False)
WANTED = candidate("wanted", placed=0.0, used=0.0, value=0.0, wanted=True)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (fifo, ["old", "stale", "cheap", "wanted"]),
        (lru, ["stale", "cheap", "old", "wanted"]),
        (cost, ["cheap", "stale", "old", "wanted"]),
    ],
)
def test_each_order_has_its_measure_and_spares_the_wanted(
    order: EvictionOrder, expected: list[str]
) -> None:
    assert [c.digest for c in order([WANTED, CHEAP, OLD, STALE])] == expected


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_no_order_depends_on_the_order_of_its_candidates(name: str) -> None:
    candidates = [candidate(d, 1.0, 1.0, 1.0, False) for d in "abcdef"]
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(candidates)
        assert [c.digest for c in ORDERS[name](candidates)] == list("abcdef")
