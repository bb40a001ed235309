"""The Ray Serve actor of one replica: engine, tokenizer, membership and HTTP server."""

import asyncio
import dataclasses
import importlib
import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import ray
from ray import serve

from cluster.config import EngineConfig, FleetConfig
from cluster.redis_client import connect
from replica.api.interfaces import Engine
from replica.api.server import Server, build_app
from replica.api.text import Text
from replica.engine.node import Node, read_node
from replica.engine.sizing import share
from replica.serving.keys import ADMIN_KEYS, API_KEYS, OPERATOR_KEY, read_keys
from replica.serving.membership import Membership
from replica.serving.node_port import bind_to_node
from replica.serving.settings import with_rank_expected
from replica.serving.shared_suspects import SharedSuspects
from replica.serving.single_process import server_config

BUFSIZE = "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE"
_HEADERS_BYTES = 16 * 2**10
_DRAIN_POLL_S = 0.5


class Replica:
    """One replica. After `__init__`, Serve builds the ASGI app on the event loop that serves it.

    config: but for `replicas`, which Serve knows. engine: import path of the engine's constructor.
    redis_variable: name of the environment variable that holds Redis' URL. Serve records a
    deployment's arguments, so these carry no secrets; keys come by environment too.
    """

    def __init__(self, config: FleetConfig, engine: str, redis_variable: str) -> None:
        bind_to_node()
        context = serve.get_replica_context()
        replicas = context._deployment_config.num_replicas or 1
        config = dataclasses.replace(config, replicas=replicas)
        self._config = dataclasses.replace(
            config,
            redis_url=os.environ[redis_variable],
            api_keys=read_keys(API_KEYS),
            admin_keys=read_keys(ADMIN_KEYS),
        )
        self._id: str = context.replica_id.to_full_id_str()
        self._engine: Engine = _imported(engine)(with_share(config, _resources(), read_node()))
        self._text = Text.read(config.engine.model)
        self._membership: Membership | None = None
        self._following: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        await self._engine.start()
        self._config = dataclasses.replace(self._config, engine=self._engine.config)
        self._membership = Membership(
            self._engine,
            self._config,
            self._id,
            run=_run(self._config),
            url=_url,
            text=self._text,
        )
        await self._membership.start()
        settings = server_config(self._config, self._id, os.environ.get(OPERATOR_KEY))
        settings = dataclasses.replace(
            settings,
            elsewhere_bytes=_elsewhere_bytes(self._config),
            names_requests=False,  # Serve does
        )
        assert self._config.redis_url is not None
        suspects = SharedSuspects(connect(self._config.redis_url), self._config.name)
        self._following = asyncio.create_task(suspects.run())
        member = self._membership
        app = build_app(
            self._engine, member, self._text, settings, suspects, member.others, member.files
        )
        self._draining = asyncio.create_task(self._cut_at_drain_s(app))

        async def closing(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            if scope["type"] == "lifespan":
                await self._close()

        return closing

    async def check_health(self) -> None:
        """Serve replaces a replica after this has raised three times."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended, and starting it again has not helped")

    async def _cut_at_drain_s(self, app: Server) -> None:
        """Gives the streams that are left then an error, before Serve ends the process."""
        while not _draining():  # noqa: ASYNC110  # Serve tells nobody
            await asyncio.sleep(_DRAIN_POLL_S)
        await asyncio.sleep(self._config.drain_s)
        app.cut()

    async def _close(self) -> None:
        for task in (self._following, self._draining):
            if task is not None:
                task.cancel()
        # Leave every router's view before the engine stops.
        if self._membership is not None:
            await self._membership.stop()
        await self._engine.stop()


def _run(config: FleetConfig) -> str:
    """An id of this start of Ray with these configured adapters."""
    adapters = blake2b(repr(sorted(config.adapters.items())).encode(), digest_size=8).hexdigest()
    return f"{ray.get_runtime_context().get_session_name()}:{adapters}"


def _draining() -> bool:
    """True once Serve stops this replica. Serve has no public hook that comes before the streams
    have ended.
    """
    return bool(getattr(_implementation(), "_shutting_down", False))


def _url() -> str:
    """Where HAProxy reaches this replica; "" until it listens. Serve has no public name for it."""
    port = getattr(_implementation(), "_http_port", None)
    host = ray.util.get_node_ip_address()
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}" if port else ""


def _implementation() -> Any:
    """Serve's own part of this actor."""
    worker = ray._private.worker.global_worker
    return getattr(worker.actors.get(worker.actor_id), "_replica_impl", None)


def _elsewhere_bytes(config: FleetConfig) -> int:
    """Bodies that HAProxy still has, whole, when a replica answers 502. Its buffer also holds the
    headers.
    """
    buffer = int(os.environ.get(BUFSIZE, 0))
    return max(buffer - _HEADERS_BYTES, 0) if config.replicas > 1 else 0


def _resources() -> Mapping[str, float]:
    """This node's resources, as Ray counts them."""
    own = ray.get_runtime_context().get_node_id()
    return next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)


def with_share(config: FleetConfig, resources: Mapping[str, float], node: Node) -> EngineConfig:
    """The engine configuration, with this replica's share of the node's memory and cores.

    The share is of the node's total memory, so every replica that Ray places here computes the
    same one, in whatever order they start.
    """
    engine = config.engine
    here = config.replicas
    for name, needed in (
        ("CPU", config.cpus_per_replica),
        ("GPU", config.replica_gpus if engine.device == "cuda" else 0),
    ):
        if needed:
            here = min(here, int(resources.get(name, 0) // needed))
    here = max(here, 1)
    if engine.device == "cpu" and engine.threads is None:
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // (here * engine.tensor_parallel))
        engine = dataclasses.replace(engine, threads=threads)
    if engine.replica_memory is None:
        engine = with_rank_expected(dataclasses.replace(config, engine=engine))
        engine = dataclasses.replace(engine, replica_memory=share(node.memory, here))
    return engine


def _imported(path: str) -> Any:
    """Imports 'package.module:attribute'."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
