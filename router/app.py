"""Builds the Serve application: the replica deployment, and the router that HAProxy asks."""

import dataclasses
import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.config import EngineConfig, FleetConfig
from cluster.config_loader import load
from cluster.errors import ConfigError
from replica.serving.actor import Replica
from replica.serving.keys import ADMIN_KEYS, API_KEYS
from router import environment
from router.ingress import Ingress

# Above this many ongoing requests, Serve would queue first-in first-out, regardless of adapters.
# Only the scheduler may queue; `queue_max` bounds it.
UNBOUNDED = 1_000_000

# Serve's default is 20 attempts; what prevents a start rarely goes away by itself.
STARTS_MAX = 3

# From the end of the drain time, when streams get an error, until Serve kills the replica.
DRAIN_MARGIN_S = 10

ROUTER_LINGERS_S = 3

ENGINE = "replica.engine.link:EngineLink"


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Builds the application from the arguments of `serve run` or a manifest.

    arguments: the fields of FleetConfig. Raises ConfigError.
    """
    for field, variable in (
        ("redis_url", environment.REDIS_URL),
        ("api_keys", API_KEYS),
        ("admin_keys", ADMIN_KEYS),
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
    asked = {
        "redis_variable": environment.REDIS_URL,
        "fleet": resolved.name,
        "step_tokens": resolved.engine.step_tokens,
        "batch_rows": resolved.engine.batch_rows_max,
        "queue_max": resolved.engine.queue_max,
    }
    router_config = RequestRouterConfig(
        request_router_class="router.affinity:AdapterAffinityRouter", request_router_kwargs=asked
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
        graceful_shutdown_timeout_s=resolved.drain_s + DRAIN_MARGIN_S,
    )(serve.ingress()(Replica))
    # The number of replicas changes nothing in a replica.
    arguments = (dataclasses.replace(resolved, replicas=1), engine)
    replicas = replicas.options(version=_version(*arguments), _internal=True)
    bound = replicas.bind(*arguments, environment.REDIS_URL)
    ingress = serve.deployment(
        name="router",
        # Reserve no CPU, so that it fits on every node with a proxy.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=STARTS_MAX,
        # It answers until every HAProxy knows its successor.
        graceful_shutdown_wait_loop_s=ROUTER_LINGERS_S,
        graceful_shutdown_timeout_s=ROUTER_LINGERS_S + 2,
    )(serve.ingress()(Ingress))
    ingress = ingress.options(version=_version(asked), _internal=True)
    return bound._with_ingress_request_router(ingress.bind(bound))


def _version(*arguments: Any) -> str:
    """Of a deployment. Serve replaces its replicas only where this has changed."""
    return blake2b(repr(arguments).encode(), digest_size=8).hexdigest()


def settle(config: FleetConfig) -> EngineConfig:
    """Resolves `device: auto`, once for all replicas.

    Leaves memory, threads and dtype open: they depend on each replica's node. Raises ConfigError.
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
    return engine
