"""The Serve request router ranks every replica, whatever the request's arguments."""

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
    """Initialized as by Serve, but without the constructor, which reports metrics to a cluster."""
    monkeypatch.setenv("SOME_REDIS", "unix:///nowhere.sock")
    made = AdapterAffinityRouter.__new__(AdapterAffinityRouter)
    made.initialize_state(
        redis_variable="SOME_REDIS", fleet="x", step_tokens=512, batch_rows=64, queue_max=64
    )
    return made


REPLICAS = [Replica("a"), Replica("b"), Replica("c")]


@pytest.mark.parametrize(
    "pending",
    [
        None,
        Pending(["fr", 100]),
        Pending([None, 100]),
        Pending([]),
        Pending([object()]),  # as from Serve's fallback proxy
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


async def test_without_replicas_serve_is_told_to_back_off(
    router: AdapterAffinityRouter,
) -> None:
    pending = Pending(["fr", 1])
    assert await router.choose_replicas([], pending) == []
    assert pending.routing_context.should_backoff


async def test_a_replica_may_leave_between_two_choices(
    router: AdapterAffinityRouter,
) -> None:
    await router.choose_replicas(REPLICAS, Pending(["fr", 1]))
    ranks = await router.choose_replicas(REPLICAS[:1], Pending(["fr", 1]))
    assert [rank[0].name for rank in ranks] == ["a"]
