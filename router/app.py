"""Builds the Serve application: the replica deployment, and the router that HAProxy asks."""

import dataclasses
import os
import secrets
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.config import EngineConfig, FleetConfig, load
from cluster.errors import ConfigError
from replica.serving.actor import Replica
from router import environment
from router.ingress import Ingress

# Above this many ongoing requests, Serve would queue first-in first-out, regardless of adapters.
# Only the scheduler may queue; `queue_max` bounds it.
UNBOUNDED = 1_000_000

# Serve's default is 20 attempts; what prevents a start rarely goes away by itself.
STARTS_MAX = 3

ENGINE = "replica.engine.link:EngineLink"


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Builds the application from the arguments of `serve run` or a manifest.

    arguments: the fields of FleetConfig. Raises ConfigError.
    """
    for field, variable in (
        ("redis_url", environment.REDIS_URL),
        ("api_keys", environment.API_KEYS),
    ):
        if arguments.get(field):
            raise ConfigError(
                f"{field}: Serve shows its arguments; set {variable} in the environment instead",
                field=field,
            )
    return compose(load(FleetConfig, arguments))


def compose(config: FleetConfig, engine: str = ENGINE) -> serve.Application:
    """engine: import path of a function from EngineConfig to `replica.api.interfaces.Engine`."""
    environment.check(os.environ)
    environment.redis_url()
    resolved = dataclasses.replace(config, engine=settle(config))
    router_config = RequestRouterConfig(
        request_router_class="router.affinity:AdapterAffinityRouter",
        request_router_kwargs={
            "redis_variable": environment.REDIS_URL,
            "fleet": resolved.name,
            "step_tokens": resolved.engine.step_tokens_max,
            "batch_rows": resolved.engine.batch_rows_max,
        },
    )
    on_gpu = resolved.engine.device == "cuda"
    replicas = serve.deployment(
        name="replica",
        num_replicas=resolved.replicas,
        ray_actor_options={
            "num_cpus": resolved.cpus_per_replica,
            # This one actor reserves the GPUs of all tensor-parallel ranks. Ray places them on one
            # node and sets CUDA_VISIBLE_DEVICES, which the ranks inherit as child processes. A
            # placement group would reserve its bundles for actors, and the ranks are none.
            "num_gpus": resolved.replica_gpus if on_gpu else 0,
        },
        max_ongoing_requests=UNBOUNDED,
        request_router_config=router_config,
        health_check_period_s=2,
        health_check_timeout_s=10,
        max_constructor_retry_count=STARTS_MAX,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=resolved.drain_s + 5,
    )(serve.ingress()(Replica))
    run = secrets.token_hex(8)
    bound = replicas.bind(resolved, engine, run, environment.REDIS_URL, environment.API_KEYS)
    ingress = serve.deployment(
        name="router",
        # Reserve no CPU, so that it fits on every node with a proxy.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=STARTS_MAX,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=2,
    )(serve.ingress()(Ingress))
    return bound._with_ingress_request_router(ingress.bind(bound))


def settle(config: FleetConfig) -> EngineConfig:
    """Resolves `device: auto` and the thread count, once for all replicas.

    Leaves memory and dtype open: they depend on each replica's node. Raises ConfigError.
    """
    engine = config.engine
    if engine.device == "auto":
        gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
        enough = gpus >= config.replica_gpus * config.replicas
        engine = dataclasses.replace(engine, device="cuda" if enough else "cpu")
    if engine.device == "cuda" and 0 < config.replica_gpus < 1 and not engine.sized:
        raise ConfigError(
            f"gpus_per_replica: {config.replica_gpus}: replicas that share a GPU would each take "
            "all of its free memory; set engine.device_memory",
            field="gpus_per_replica",
        )
    if engine.device == "cpu" and engine.threads is None:
        cores = len(os.sched_getaffinity(0))
        processes = config.replicas * engine.tensor_parallel
        engine = dataclasses.replace(engine, threads=max(1, cores // processes))
    return engine
