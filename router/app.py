"""Composes the Serve application: replicas behind HAProxy, and the router that it asks."""

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

# Serve queues first-in first-out beyond this, in front of the scheduler and blind to adapters.
# The only queue is the scheduler's, and its bound is `queue_max`.
UNBOUNDED = 1_000_000

# A replica that cannot start will not start the twentieth time either.
STARTS_MAX = 3

ENGINE = "replica.engine.link:EngineLink"


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """From the arguments of `serve run` or of a manifest: the fields of FleetConfig."""
    for field, variable in (
        ("redis_url", environment.REDIS_URL),
        ("api_keys", environment.API_KEYS),
    ):
        if arguments.get(field):
            raise ConfigError(
                f"{field}: Serve would show it; set {variable} in the environment", field=field
            )
    return compose(load(FleetConfig, arguments))


def compose(config: FleetConfig, engine: str = ENGINE) -> serve.Application:
    """engine: import path of what makes a `replica.api.interfaces.Engine` from an EngineConfig."""
    environment.check(os.environ)
    environment.redis_url()
    settled = dataclasses.replace(config, engine=settle(config))
    router_config = RequestRouterConfig(
        request_router_class="router.affinity:AdapterAffinityRouter",
        request_router_kwargs={
            "redis_variable": environment.REDIS_URL,
            "fleet": settled.name,
            "step_tokens": settled.engine.step_tokens_max,
            "batch_rows": settled.engine.batch_rows_max,
        },
    )
    on_gpu = settled.engine.device == "cuda"
    replicas = serve.deployment(
        name="replica",
        num_replicas=settled.replicas,
        ray_actor_options={
            "num_cpus": settled.cpus_per_replica,
            # All on this one actor, though ranks have a GPU each: Ray finds them on one node and
            # names them to the replica's process, and ranks are its children, who inherit that. The
            # bundles of a placement group would be kept for actors, of which there are none here.
            "num_gpus": settled.replica_gpus if on_gpu else 0,
        },
        max_ongoing_requests=UNBOUNDED,
        request_router_config=router_config,
        health_check_period_s=2,
        health_check_timeout_s=10,
        max_constructor_retry_count=STARTS_MAX,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settled.drain_s + 5,
    )(serve.ingress()(Replica))
    run = secrets.token_hex(8)
    bound = replicas.bind(settled, engine, run, environment.REDIS_URL, environment.API_KEYS)
    ingress = serve.deployment(
        name="router",
        # Free of charge, so that it fits beside every proxy.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=STARTS_MAX,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=2,
    )(serve.ingress()(Ingress))
    return bound._with_ingress_request_router(ingress.bind(bound))


def settle(config: FleetConfig) -> EngineConfig:
    """What `auto` means of devices and threads is decided once, here, not by each replica for
    itself. What memory and processor allow is not: the replicas may be on other nodes.
    """
    engine = config.engine
    if engine.device == "auto":
        gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
        enough = gpus >= config.replica_gpus * config.replicas
        engine = dataclasses.replace(engine, device="cuda" if enough else "cpu")
    if engine.device == "cuda" and 0 < config.replica_gpus < 1 and not engine.sized:
        raise ConfigError(
            f"gpus_per_replica: {config.replica_gpus}: each of the replicas on a GPU would take "
            "what is free; set engine.device_memory",
            field="gpus_per_replica",
        )
    if engine.device == "cpu" and engine.threads is None:
        cores = len(os.sched_getaffinity(0))
        processes = config.replicas * engine.tensor_parallel
        engine = dataclasses.replace(engine, threads=max(1, cores // processes))
    return engine
