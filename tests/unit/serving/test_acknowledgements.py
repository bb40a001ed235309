"""Whom a change waits for, when Redis loses the leases of those who are alive."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from cluster.recovery import Stamp
from cluster.registry import Lease, Standing
from cluster.values import LoadReport
from replica.serving import acknowledgements
from replica.serving.acknowledgements import Acknowledgements, Answers
from tests.fake_catalog import FakeClient, FakeServer

LEASE_S = 3.0


class Registry:
    """What Redis answers, one look after another; the last answer stays."""

    def __init__(self, *answers: tuple[tuple[str, int], dict[str, Stamp]]) -> None:
        self.answers = list(answers)

    async def standing(self, digests: Sequence[str]) -> tuple[tuple[str, int], dict[str, Standing]]:
        seen, alive = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return seen, {
            name: (Lease(name, f"{name}:1", 0.0, LEASE_S, stamp, LoadReport()), {})
            for name, stamp in alive.items()
        }


BOTH = {"own": (1, 4), "other": (1, 4)}
DONE = {"own": (1, 5), "other": (1, 5)}


def clock() -> Callable[[], float]:
    """A tenth of a second passes between two looks at it."""
    tenths = itertools.count()
    return lambda: next(tenths) / 10


async def asked(registry: Registry, timeout_s: float = 1e9) -> Answers:
    """What a change at (1, 5) is answered; both replicas were alive at the look before it."""
    client = cast(Any, FakeClient(FakeServer()))
    waiting = Acknowledgements(client, "f", "own", LEASE_S, clock())
    waiting._registry = cast(Any, registry)
    await waiting._read()
    return await asyncio.wait_for(waiting.of((1, 5), set(), timeout_s), 60.0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acknowledgements, "POLL_S", 0.0)


@pytest.mark.parametrize(
    "lost",
    [
        (("", 0), {}),  # emptied
        (("e2", 1), {"own": (1, 5)}),  # emptied, and this replica has published again
        (("e1", 6), {"own": (1, 5)}),  # an older state came back
        (("e1", 9), {"other": (1, 5)}),
    ],
)
async def test_a_replica_whose_lease_redis_has_lost_is_waited_for(
    lost: tuple[tuple[str, int], dict[str, Stamp]],
) -> None:
    answers = await asked(Registry((("e1", 7), BOTH), lost, lost, (("e2", 2), DONE)))
    assert sorted(answers.applied) == ["other", "own"] and answers.late == ()


async def test_a_replica_that_leaves_is_not_waited_for() -> None:
    answers = await asked(Registry((("e1", 7), BOTH), (("e1", 8), {"own": (1, 5)})))
    assert answers == Answers(("own",), (), {})


async def test_one_that_does_not_come_back_is_late() -> None:
    registry = Registry((("e1", 7), BOTH), (("e2", 1), {"own": (1, 5)}))
    answers = await asked(registry, timeout_s=LEASE_S / 2)
    assert (answers.applied, answers.late) == (("own",), ("other",))


async def test_at_the_first_look_too_this_replica_must_be_there() -> None:
    client = cast(Any, FakeClient(FakeServer()))
    waiting = Acknowledgements(client, "f", "own", LEASE_S, clock())
    # The other one's lease is back after this one's.
    looks = [(("", 0), {}), (("e2", 1), {"own": (1, 5)}), (("e2", 2), DONE)]
    waiting._registry = cast(Any, Registry(*looks))
    answers = await asyncio.wait_for(waiting.of((1, 5), set(), 1e9), 60.0)
    assert sorted(answers.applied) == ["other", "own"]


def says(waiting: Acknowledgements, name: str, stamp: Stamp, failed: bool = False) -> None:
    waiting._heard({"incarnation": f"{name}:1", "catalog": list(stamp), "failed": failed})


class CountedRegistry(Registry):
    looks = 0

    async def standing(self, digests: Sequence[str]) -> tuple[tuple[str, int], dict[str, Standing]]:
        self.looks += 1
        return await super().standing(digests)


@pytest.fixture
async def told(monkeypatch: pytest.MonkeyPatch) -> Acknowledgements:
    """Both replicas were seen just now, and have said that they applied (1, 5)."""
    monkeypatch.setattr(acknowledgements, "POLL_S", 1e9)
    client = cast(Any, FakeClient(FakeServer()))
    waiting = Acknowledgements(client, "f", "own", LEASE_S, clock())
    waiting._registry = cast(Any, CountedRegistry((("e1", 7), BOTH), (("e1", 9), DONE)))
    await waiting._read()
    for name in BOTH:
        says(waiting, name, (1, 5))
    return waiting


async def looks_for(waiting: Acknowledgements, stamp: Stamp = (1, 5)) -> int:
    registry = cast(CountedRegistry, waiting._registry)
    before = registry.looks
    answers = await asyncio.wait_for(waiting.of(stamp, {"d"}, 1e9), 60.0)
    assert sorted(answers.applied) == ["other", "own"]
    return registry.looks - before


async def test_what_all_have_said_needs_no_look(told: Acknowledgements) -> None:
    assert await looks_for(told) == 0


async def test_a_look_finds_why_a_version_failed(told: Acknowledgements) -> None:
    says(told, "other", (1, 5), failed=True)
    assert await looks_for(told) == 1


async def test_a_look_finds_who_has_started(told: Acknowledgements) -> None:
    says(told, "third", (1, 5))
    assert await looks_for(told) == 1


async def test_an_old_look_does_not_say_who_is_alive(
    told: Acknowledgements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledgements, "POLL_S", 0.0)
    assert await looks_for(told) == 1
