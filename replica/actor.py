"""The Serve deployment around one replica: engine, tokenizer, membership and HTTP server."""

import dataclasses
import importlib
import os
from typing import Any

from ray import serve

from cluster.config import FleetConfig
from replica.alone import server_config
from replica.front import Engine
from replica.membership import Membership
from replica.server import build_app
from replica.text import Text


class Replica:
    """One replica. Serve awaits the ASGI app after `__init__`, on the loop that runs it then.

    engine: import path of what makes the engine. run: which start of the fleet this is.
    redis_variable, keys_variable: names of the environment variables with the URL of Redis and
    the API keys, which Serve's own records must not hold.
    """

    def __init__(
        self, config: FleetConfig, engine: str, run: str, redis_variable: str, keys_variable: str
    ) -> None:
        keys = tuple(key for key in os.environ.get(keys_variable, "").split(",") if key)
        self._config = dataclasses.replace(
            config, redis_url=os.environ[redis_variable], api_keys=keys
        )
        self._id: str = serve.get_replica_context().replica_id.to_full_id_str()
        self._engine: Engine = _imported(engine)(config.engine)
        self._text = Text.read(config.engine.model)
        self._membership = Membership(self._engine, self._config, self._id, run=run)

    async def __serve_build_asgi_app__(self) -> Any:
        await self._engine.start()
        await self._membership.start()
        settings = server_config(self._config, self._id)
        app = build_app(self._engine, self._membership, self._text, settings)

        async def closing(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            if scope["type"] == "lifespan":
                await self._close()

        return closing

    async def check_health(self) -> None:
        """Serve replaces a replica that raises here three times."""
        if not self._engine.alive:
            raise RuntimeError("the engine's process has ended")

    async def _close(self) -> None:
        # First out of every router's view, then the engine.
        await self._membership.stop()
        await self._engine.stop()


def _imported(path: str) -> Any:
    """'package.module:attribute' → the attribute."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
