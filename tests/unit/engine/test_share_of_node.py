"""How many replicas share one node's memory or one GPU, by Ray's and the configured resources."""

from typing import Any

import pytest

from cluster.config import EngineConfig, FleetConfig
from cluster.errors import ConfigError
from replica.engine.node import Node
from replica.engine.sizing import share
from replica.serving.actor import with_share
from router.app import settle

MEMORY = 64 * 2**30


def memory(resources: dict[str, float], free: int = MEMORY, **fleet: Any) -> int | None:
    engine = EngineConfig("m", device=fleet.pop("device", "cpu"), tensor_parallel=fleet.pop("n", 1))
    config = FleetConfig(engine, **fleet)
    return with_share(config, resources, Node(MEMORY, free, False)).replica_memory


@pytest.mark.parametrize(
    ("resources", "fleet", "here"),
    [
        ({"CPU": 16.0}, {"replicas": 2}, 2),
        ({"CPU": 16.0}, {"replicas": 99, "cpus_per_replica": 4}, 4),
        ({"CPU": 16.0, "GPU": 8.0}, {"replicas": 99, "device": "cuda"}, 8),
        ({"CPU": 4.0, "GPU": 8.0}, {"replicas": 99, "device": "cuda"}, 4),
        ({"CPU": 16.0, "GPU": 8.0}, {"replicas": 99, "device": "cuda", "n": 4}, 2),
        ({"CPU": 16.0}, {"replicas": 3, "cpus_per_replica": 0}, 3),
        ({"CPU": 0.5}, {"replicas": 3}, 1),
    ],
)
def test_a_nodes_memory_is_shared_by_as_many_as_may_be_put_there(
    resources: dict[str, float], fleet: dict[str, Any], here: int
) -> None:
    assert memory(resources, **fleet) == share(MEMORY, here)


def test_whoever_starts_last_has_as_much_as_the_first() -> None:
    assert memory({"CPU": 2.0}, free=2**30, replicas=2) == share(MEMORY, 2)


def test_a_share_that_is_given_wins() -> None:
    engine = EngineConfig("m", replica_memory=7)
    assert with_share(FleetConfig(engine), {"CPU": 1.0}, Node(MEMORY, MEMORY, False)) == engine


def test_replicas_that_share_a_gpu_are_told_what_each_may_take() -> None:
    def shared(gpus: float, **engine: Any) -> FleetConfig:
        return FleetConfig(EngineConfig("m", device="cuda", **engine), gpus_per_replica=gpus)

    with pytest.raises(ConfigError, match=r"^gpus_per_replica: 0\.5: ") as caught:
        settle(shared(0.5, adapter_memory=1))
    assert caught.value.field == "gpus_per_replica"
    for config in (shared(0.5, device_memory=1), shared(0.5, adapter_memory=1, kv_memory=1)):
        assert settle(config) == config.engine
    assert settle(shared(1)) == shared(1).engine
