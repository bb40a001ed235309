"""What a replica does with the state that it finds in Redis, and which record of a name stays."""

import asyncio
import dataclasses
import logging

import pytest

from cluster.recovery import (
    Head,
    Record,
    Records,
    Stamp,
    Step,
    decide,
    decode_record,
    encode_version,
)
from cluster.values import Version
from tests.catalog_histories import History

LEASE_MS = 3000
NOW_MS = 1_000_000
SETTLED = Head(5, 7, 3, "s1", "", "s1", 3, NOW_MS)


@pytest.mark.parametrize(
    ("changes", "known", "step"),
    [
        ({}, (5, 7), (Step.FOLLOW, 0)),
        ({}, (5, 6), (Step.FOLLOW, 0)),  # a message is on its way
        ({}, (4, 9), (Step.FOLLOW, 0)),
        ({}, (0, 0), (Step.FOLLOW, 0)),
        ({}, (5, 8), (Step.BEGIN, LEASE_MS)),  # an older state came back
        ({}, (6, 1), (Step.BEGIN, LEASE_MS)),
        ({"server": "s2"}, (5, 7), (Step.BEGIN, LEASE_MS)),  # restarted, or another took over
        ({"held": 0}, (5, 7), (Step.BEGIN, LEASE_MS)),  # half evicted
        ({"count": 4}, (5, 7), (Step.BEGIN, LEASE_MS)),
        ({"generation": 0, "settled_by": ""}, (5, 7), (Step.BEGIN, LEASE_MS)),  # empty
        ({"generation": 0, "settled_by": ""}, (0, 0), (Step.BEGIN, LEASE_MS)),
        ({"settling": f"s1:{NOW_MS - 1000}"}, (5, 7), (Step.WAIT, 2000)),
        ({"settling": f"s1:{NOW_MS - 2999}"}, (5, 7), (Step.WAIT, 1)),
        ({"settling": f"s1:{NOW_MS - 3000}"}, (5, 7), (Step.SETTLE, 0)),
        ({"settling": f"s2:{NOW_MS - 3000}"}, (5, 7), (Step.BEGIN, LEASE_MS)),  # restarted since
        ({"settling": f"s1:{NOW_MS + 1}"}, (5, 7), (Step.BEGIN, LEASE_MS)),  # clock set back
    ],
)
def test_what_a_replica_does(
    changes: dict[str, object], known: Stamp, step: tuple[Step, int]
) -> None:
    head = dataclasses.replace(SETTLED, **changes)  # type: ignore[arg-type]
    assert decide(head, known, LEASE_MS) == step


def record(generation: int, sequence: int, digest: str | None = "d") -> Record:
    version = None if digest is None else Version("a", digest, "/a", 8, 100)
    return Record((generation, sequence), version, "", f"{generation}:{sequence}")


@pytest.mark.parametrize(
    ("ours", "theirs", "winner"),
    [
        (None, record(1, 1), "theirs"),
        (record(1, 1), None, "ours"),
        (record(1, 1), record(1, 2), "theirs"),
        (record(1, 9), record(2, 1), "theirs"),  # a later generation, whatever its sequence
        (record(1, 2, None), record(1, 1), "ours"),  # a removal is not undone
        (record(1, 1), record(1, 2, None), "theirs"),
        (record(1, 1), record(1, 1), "both"),
    ],
)
def test_which_record_of_a_name_stays(
    ours: Record | None, theirs: Record | None, winner: str
) -> None:
    records = Records()
    records.take({} if ours is None else {"a": ours})
    in_redis = {} if theirs is None else {"a": theirs}
    assert list(records.newer_than(in_redis)) == (["a"] if winner == "ours" else [])
    changes = records.take(in_redis)
    assert list(changes) == (["a"] if winner == "theirs" else [])
    assert records.get("a") == (theirs if winner == "theirs" else ours)


def test_books_merge_to_the_same_in_any_order() -> None:
    parts = [{f"a{i}": record(i % 3, j)} for j, i in enumerate([0, 1, 2, 1, 0, 2, 1])]
    one, other = Records(), Records()
    for part in parts:
        one.take(part)
    for part in reversed(parts):
        other.take(part)
    for name in ("a0", "a1", "a2"):
        assert one.get(name) == other.get(name)
    assert one.get("a1") == record(1, 6)


def test_a_copy_that_only_follows_gives_up_what_nobody_has() -> None:
    records = Records()
    records.take({"a": record(1, 1), "b": record(1, 2), "c": record(1, 3)})
    changes = records.replace({"b": record(1, 2), "c": record(1, 1, "old")})
    assert {n: v and v.digest for n, v in changes.items()} == {"a": None, "c": "old"}
    assert records.get("a") is None


def test_the_oldest_removals_are_forgotten() -> None:
    records = Records()
    records.take({f"a{i}": record(1, i, None) for i in range(20)} | {"kept": record(1, 0)})
    assert records.forget_removals(10) == {}
    records.take({"one more": record(1, 20, None)})
    assert set(records.forget_removals(10)) == {f"a{i}" for i in range(11)}
    assert records.get("kept") and records.get("a11") and not records.get("a10")
    records.take({f"b{i}": record(2, i, None) for i in range(10)})
    assert records.forget_removals(10) == {}, "it counts those that are left"


def test_a_newer_process_may_write_more_fields() -> None:
    version = Version("a", "d", "/a", 8, 100, pinned=True, weight=2.0, invocation=(7, 9))
    text = encode_version(version)
    text = f'{{"new":1,"stamp":[1,2],"run":"r","version":{text[:-1]},"more":[]}}}}'
    assert decode_record(text) == Record((1, 2), version, "r", text)


@pytest.mark.parametrize("part", range(10))
def test_random_histories_lose_no_change_that_a_living_replica_acknowledged(
    seed: int, part: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    writes = 0
    for number in range(50):
        history = History(seed + 50 * part + number)
        try:
            asyncio.run(history.run())
        except AssertionError as error:
            raise AssertionError(f"history {seed + 50 * part + number}: {error}") from error
        writes += len(history.writes)
    assert writes > 50 * 20, "too few changes went through"
