"""`lorafleet replica`: engine, local catalog and HTTP server, without Ray or Redis."""

import asyncio
import dataclasses
import math
import socket

import uvicorn

from cluster.config import FleetConfig
from cluster.errors import EngineFailed
from replica.api.access import Rules
from replica.api.interfaces import Engine
from replica.api.sampling import read_defaults
from replica.api.server import Server, ServerConfig, build_app
from replica.api.text import Text
from replica.api.tools import ToolFormat
from replica.engine.link import EngineLink
from replica.model.checkpoint import shape_of
from replica.serving.http_protocol import HttpProtocol
from replica.serving.keys import OperatorKey
from replica.serving.local_catalog import LocalCatalog

# Time for the final errors to reach clients before their connections are closed.
_FINAL_SEND_S = 0.5


def server_config(config: FleetConfig, replica_id: str, operator_key: str | None) -> ServerConfig:
    """The HTTP server's part of the fleet's configuration."""
    engine = config.engine
    shape = shape_of(engine.model)
    return ServerConfig(
        base=engine.base_name,
        context=min(shape.context, engine.context_tokens_max or shape.context),
        vocab=shape.vocab,
        replica_id=replica_id,
        rules=Rules(
            config.api_keys,
            config.admin_keys,
            operator_key,
            config.allowed_hosts,
            changes=bool(config.adapter_roots),
            open_metrics=config.open_metrics,
            shared_prefixes=config.shared_prefixes,
        ),
        defaults=read_defaults(engine.model),
        strict_fields=config.strict_fields,
        default_is_base=config.default_is_base,
        tool_format=None if config.tool_parser == "auto" else ToolFormat(config.tool_parser),
        allowed_origins=config.allowed_origins,
        request_log=config.request_log,
    )


class Listening(uvicorn.Server):
    """Also exits when its engine has died, so that a supervisor can restart the process.

    On shutdown, requests may run for another `drain_s`. Then the remaining ones get an error, and
    clients that do not read it are disconnected.
    """

    def __init__(self, app: Server, engine: Engine, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                http=HttpProtocol,
                ws="none",
                # Longer than our own shutdown, since uvicorn cancels requests without an answer.
                timeout_graceful_shutdown=math.ceil(drain_s + _FINAL_SEND_S) + 1,
            )
        )
        self._app = app
        self._engine = engine
        self._drain_s = drain_s

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or not self._engine.alive

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"ready: http://{host}:{port}/v1", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut(self) -> None:
        await asyncio.sleep(self._drain_s)
        self._app.cut()
        await asyncio.sleep(_FINAL_SEND_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def run(config: FleetConfig, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM. Prints a `ready` line when it accepts requests.

    Raises FleetError, including EngineFailed when the engine process dies.
    """
    engine = EngineLink(config.engine)
    operator = OperatorKey(listener.getsockname()[1])
    text = Text.read(config.engine.model)
    try:
        await engine.start()
        config = dataclasses.replace(config, engine=engine.config)
        adapters = LocalCatalog(engine, config, text=text)
        await adapters.start()
        app = build_app(engine, adapters, text, server_config(config, "local", operator.text))
        server = Listening(app, engine, config.drain_s)
        await server.serve(sockets=[listener])
        if not engine.alive:
            raise EngineFailed("the engine's process has ended")
    finally:
        operator.remove()
        await engine.stop()
