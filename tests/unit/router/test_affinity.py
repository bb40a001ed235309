"""The Serve request router: whatever it is asked, it answers, and it never waits."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from router.affinity import AdapterAffinityRouter


@dataclass(frozen=True)
class Replica:
    name: str

    @property
    def replica_id(self) -> Any:
        return SimpleNamespace(to_full_id_str=lambda: self.name)


@dataclass
class Pending:
    args: list[Any]
    routing_context: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(should_backoff=False)
    )


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> AdapterAffinityRouter:
    """As Serve makes it, without the cluster that its constructor reports metrics to."""
    monkeypatch.setenv("SOME_REDIS", "unix:///nowhere.sock")
    made = AdapterAffinityRouter.__new__(AdapterAffinityRouter)
    made.initialize_state(redis_variable="SOME_REDIS", fleet="x", step_tokens=512, batch_rows=64)
    return made


REPLICAS = [Replica("a"), Replica("b"), Replica("c")]


@pytest.mark.parametrize(
    "pending",
    [
        None,
        Pending(["fr", 100]),
        Pending([None, 100]),
        Pending([]),
        Pending([object()]),  # the fallback proxy passes its own
        Pending(["fr", "many"]),
        Pending(["fr", 1, 2]),
    ],
)
async def test_every_replica_is_ranked_once_in_singletons(
    router: AdapterAffinityRouter, pending: Any
) -> None:
    ranks = await router.choose_replicas(REPLICAS, pending)
    assert all(len(rank) == 1 for rank in ranks)
    assert {rank[0].name for rank in ranks} == {"a", "b", "c"}


async def test_a_pick_counts_before_the_next_choice(router: AdapterAffinityRouter) -> None:
    firsts = [(await router.choose_replicas(REPLICAS, Pending([None, 9])))[0][0] for _ in range(6)]
    assert sorted(replica.name for replica in firsts) == ["a", "a", "b", "b", "c", "c"]


async def test_without_replicas_it_asks_to_wait_rather_than_to_be_asked_again(
    router: AdapterAffinityRouter,
) -> None:
    pending = Pending(["fr", 1])
    assert await router.choose_replicas([], pending) == []
    assert pending.routing_context.should_backoff


async def test_a_replica_that_goes_between_two_choices_is_no_trouble(
    router: AdapterAffinityRouter,
) -> None:
    await router.choose_replicas(REPLICAS, Pending(["fr", 1]))
    ranks = await router.choose_replicas(REPLICAS[:1], Pending(["fr", 1]))
    assert [rank[0].name for rank in ranks] == ["a"]
