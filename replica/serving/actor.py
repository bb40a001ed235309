"""The Ray Serve actor of one replica: engine, tokenizer, membership and HTTP server."""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from cluster.config import EngineConfig, FleetConfig
from replica.api.interfaces import Engine
from replica.api.server import build_app
from replica.api.text import Text
from replica.engine.node import Node, read_node
from replica.engine.sizing import share
from replica.serving.membership import Membership
from replica.serving.settings import with_rank_expected
from replica.serving.single_process import server_config


class Replica:
    """One replica. After `__init__`, Serve builds the ASGI app on the event loop that serves it.

    engine: import path of the engine's constructor. run: an id of this start of the fleet.
    redis_variable, keys_variable: names of the environment variables that hold Redis' URL and the
    API keys. Serve records a deployment's arguments, so these carry no secrets.
    """

    def __init__(
        self, config: FleetConfig, engine: str, run: str, redis_variable: str, keys_variable: str
    ) -> None:
        keys = tuple(key for key in os.environ.get(keys_variable, "").split(",") if key)
        self._config = dataclasses.replace(
            config, redis_url=os.environ[redis_variable], api_keys=keys
        )
        self._run = run
        self._id: str = serve.get_replica_context().replica_id.to_full_id_str()
        self._engine: Engine = _imported(engine)(with_share(config, _resources(), read_node()))
        self._text = Text.read(config.engine.model)
        self._membership: Membership | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        await self._engine.start()
        self._config = dataclasses.replace(self._config, engine=self._engine.config)
        self._membership = Membership(self._engine, self._config, self._id, run=self._run)
        await self._membership.start()
        settings = server_config(self._config, self._id)
        app = build_app(self._engine, self._membership, self._text, settings)

        async def closing(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            if scope["type"] == "lifespan":
                await self._close()

        return closing

    async def check_health(self) -> None:
        """Serve replaces a replica after this has raised three times."""
        if not self._engine.alive:
            raise RuntimeError("the engine's process has ended")

    async def _close(self) -> None:
        # Leave every router's view before the engine stops.
        if self._membership is not None:
            await self._membership.stop()
        await self._engine.stop()


def _resources() -> Mapping[str, float]:
    """This node's resources, as Ray counts them."""
    own = ray.get_runtime_context().get_node_id()
    return next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)


def with_share(config: FleetConfig, resources: Mapping[str, float], node: Node) -> EngineConfig:
    """The engine configuration, with this replica's share of the node's memory.

    The share is of the node's total memory, so every replica that Ray places here computes the
    same one, in whatever order they start.
    """
    engine = config.engine
    if engine.replica_memory is not None:
        return engine
    here = config.replicas
    for name, needed in (
        ("CPU", config.cpus_per_replica),
        ("GPU", config.replica_gpus if engine.device == "cuda" else 0),
    ):
        if needed:
            here = min(here, int(resources.get(name, 0) // needed))
    engine = with_rank_expected(config)
    return dataclasses.replace(engine, replica_memory=share(node.memory, max(here, 1)))


def _imported(path: str) -> Any:
    """Imports 'package.module:attribute'."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
