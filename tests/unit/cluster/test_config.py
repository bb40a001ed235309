"""The configuration: unknown keys and wrong values are refused by name."""

import dataclasses
import math
from typing import Any

import pytest

from cluster.config import EngineConfig, FleetConfig
from cluster.config_loader import load, parse_bytes
from cluster.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("2kb", 2000),
        ("10", 10),
        (" 3B ", 3),
        ("1tb", 10**12),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text, "adapter_memory") == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 MiBs", "1,5GiB", "0x10", "1e3"])
def test_what_is_no_size_is_refused_naming_the_field(text: str) -> None:
    with pytest.raises(ConfigError, match="adapter_memory") as caught:
        parse_bytes(text, "adapter_memory")
    assert caught.value.field == "adapter_memory"


def test_a_fleet_is_loaded_and_dumped_without_loss() -> None:
    data = {
        "engine": {"model": "/m/base", "adapter_memory": "64MiB", "slots_max": 3},
        "replicas": 2,
        "adapters": {"a": "/a"},
        "adapter_roots": ["/r"],
        "lease_s": 2,
    }
    config = load(FleetConfig, data)
    assert config.engine == EngineConfig("/m/base", adapter_memory=64 * 2**20, slots_max=3)
    assert (config.replicas, config.adapter_roots, config.lease_s) == (2, ("/r",), 2.0)
    assert load(FleetConfig, dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"engine": {"model": "m"}, "replica": 2}, "replica"),
        ({"engine": {"model": "m", "ranks": 2}}, "engine.ranks"),
        ({"engine": {}}, "engine.model"),
        ({}, "engine"),
        ({"engine": []}, "engine"),
        ({"engine": {"model": 1}}, "engine.model"),
        ({"engine": {"model": "m", "device": "tpu"}}, "engine.device"),
        ({"engine": {"model": "m"}, "replicas": "2"}, "replicas"),
        ({"engine": {"model": "m"}, "replicas": True}, "replicas"),
        ({"engine": {"model": "m"}, "adapter_roots": "/r"}, "adapter_roots"),
        ({"engine": {"model": "m"}, "adapter_roots": [1]}, "adapter_roots[0]"),
        ({"engine": {"model": "m"}, "adapters": ["a"]}, "adapters"),
        ({"engine": {"model": "m"}, "adapters": {"a": 1}}, "adapters.a"),
        ({"engine": {"model": "m", "adapter_memory": "lots"}}, "engine.adapter_memory"),
        ({"engine": {"model": "m"}, "port": 70000}, "port"),
        ({"engine": {"model": "m"}, "replicas": 0}, "replicas"),
        ({"engine": {"model": "m"}, "adapter_disk": 0}, "adapter_disk"),
        ({"engine": {"model": "m"}, "adapter_disk": "much"}, "adapter_disk"),
        ({"engine": {"model": "m", "rank_max": 0}}, "rank_max"),
        ({"engine": {"model": "m", "slots_max": -1}}, "slots_max"),
        ({"engine": {"model": "m", "slots_max": 256}}, "slots_max"),
        ({"engine": {"model": "m", "directory_slots": 1}}, "directory_slots"),
        ({"engine": {"model": "m", "threads": 100_000}}, "threads"),
        ({"engine": {"model": "m", "directory_slots": 10**11}}, "directory_slots"),
        ({"engine": {"model": "m"}, "drain_s": math.inf}, "drain_s"),
        ({"engine": {"model": "m"}, "host": ""}, "host"),
        ({"engine": {"model": "m"}, "api_keys": ["k", ""]}, "api_keys"),
        ({"engine": {"model": "m", "host_memory": -1}}, "host_memory"),
        ({"engine": {"model": "m", "adapter_memory": 0}}, "adapter_memory"),
        ({"engine": {"model": "m", "replica_memory": 0}}, "replica_memory"),
        ({"engine": {"model": "m", "memory_utilization": 0.0}}, "memory_utilization"),
        ({"engine": {"model": "m", "memory_utilization": 1.01}}, "memory_utilization"),
        ({"engine": {"model": "m", "device_memory": 9, "kv_memory": 9}}, "device_memory"),
        ({"engine": {"model": "m", "device_memory": 9, "adapter_memory": 9}}, "device_memory"),
        ({"engine": {"model": "m", "prefetch_depth": -1}}, "prefetch_depth"),
        ({"engine": {"model": "m", "parked_pages_max": -1}}, "parked_pages_max"),
        ({"engine": {"model": "m", "ttft_target_s": 0}}, "ttft_target_s"),
        ({"engine": {"model": "m", "quantum_s": math.nan}}, "quantum_s"),
        ({"engine": {"model": "m", "load_retry_max_s": math.nan}}, "load_retry_max_s"),
        ({"engine": {"model": "m", "plan_depth": True}}, "engine.plan_depth"),
        ({"engine": {"model": "m"}, "drain_s": -1}, "drain_s"),
        ({"engine": {"model": "m", "overlap": False}}, "engine.overlap"),
        ({"engine": {"model": "m"}, "gpus_per_replica": -1}, "gpus_per_replica"),
        (
            {"engine": {"model": "m", "tensor_parallel": 2}, "gpus_per_replica": 1},
            "gpus_per_replica",
        ),
        ({"engine": {"model": "m"}, "report_s": 2.0, "lease_s": 3.0}, "report_s"),
    ],
)
def test_a_mistake_is_refused_naming_its_key(data: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(FleetConfig, data)
    assert caught.value.field == field
    assert field in caught.value.message


def test_a_replica_takes_a_gpu_for_each_rank_unless_told() -> None:
    def gpus(ranks: int, told: float | None) -> float:
        return FleetConfig(
            EngineConfig("m", tensor_parallel=ranks), gpus_per_replica=told
        ).replica_gpus

    assert [gpus(1, None), gpus(4, None), gpus(4, 4), gpus(1, 0.5)] == [1, 4, 4, 0.5]


def test_the_base_models_name_is_the_directorys_unless_told() -> None:
    assert EngineConfig("/m/base/").base_name == "base"
    assert EngineConfig("/m/base", served_model_name="llama").base_name == "llama"
