"""Who has a change that Redis may have lost while the replicas were asked."""

from collections.abc import Iterable, Sequence, Set
from typing import Any, cast

import pytest

from cluster.config import FleetConfig
from cluster.recovery import Stamp
from replica.serving import changes
from replica.serving.acknowledgements import Answers
from replica.serving.changes import Changes
from tests.small_files import settled_config

WRITTEN = (1, 3)
ANSWERS = Answers(("r1",), ("r2",), {"r2": {"d": "no such directory"}})


class FakeCatalog:
    """has: what Redis answers, one look after another."""

    def __init__(self, stamp: Stamp, has: Sequence[Stamp | None] = ()) -> None:
        self.stamp = stamp
        self._answers = list(has)

    async def has(self, names: Iterable[str], stamp: Stamp) -> Stamp | None:
        assert (list(names), stamp) == (["a"], WRITTEN)
        return self._answers.pop(0)


class FakeAcknowledgements:
    def __init__(self) -> None:
        self.asked: list[Stamp] = []

    async def of(self, stamp: Stamp, digests: Set[str], timeout_s: float, *, new: bool) -> Answers:
        assert digests == {"d"} and new
        self.asked.append(stamp)
        return ANSWERS


async def acknowledged(
    catalog: FakeCatalog, asked: FakeAcknowledgements, times_s: list[float]
) -> Answers:
    config = FleetConfig(engine=settled_config("model"), acknowledge_s=5.0)
    parts: list[Any] = [catalog, asked, None, None, config, lambda: times_s.pop(0)]
    return await cast(Any, Changes)(*parts)._acknowledged(["a"], WRITTEN, {"d"})  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "POLL_S", 0.0)


async def test_in_one_generation_the_replicas_answer() -> None:
    asked = FakeAcknowledgements()
    answer = await acknowledged(FakeCatalog((1, 9)), asked, [0.0] * 9)
    assert (answer, asked.asked) == (ANSWERS, [WRITTEN])


async def test_in_a_new_generation_they_are_asked_for_a_state_that_has_the_change() -> None:
    asked, catalog = FakeAcknowledgements(), FakeCatalog((2, 5), [None, (2, 6)])
    answer = await acknowledged(catalog, asked, [0.0] * 9)
    assert (answer, asked.asked) == (ANSWERS, [WRITTEN, WRITTEN, (2, 6)])


async def test_a_change_that_redis_has_lost_is_acknowledged_by_nobody() -> None:
    asked, catalog = FakeAcknowledgements(), FakeCatalog((2, 5), [None, None])
    answer = await acknowledged(catalog, asked, [0.0, 0.0, 0.0, 6.0, 6.0])
    assert answer == Answers((), ("r1", "r2"), {})
