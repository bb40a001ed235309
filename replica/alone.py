"""One replica by itself: engine, adapters in memory, HTTP server. No Ray, no Redis."""

import socket

import uvicorn

from cluster.config import FleetConfig
from cluster.errors import EngineFailed
from replica.link import EngineLink
from replica.server import ServerConfig, build_app
from replica.shape import read_shape
from replica.standalone import Standalone
from replica.text import Text


def server_config(config: FleetConfig, replica_id: str) -> ServerConfig:
    """What the HTTP server needs of the fleet's configuration."""
    engine = config.engine
    shape = read_shape(engine.model)
    return ServerConfig(
        base=engine.base_name,
        context=min(shape.context, engine.context_tokens_max or shape.context),
        vocab=shape.vocab,
        root=engine.model,
        replica_id=replica_id,
        api_keys=config.api_keys,
    )


class _Server(uvicorn.Server):
    """Ends also with its engine: whoever started it may start another."""

    def __init__(self, config: uvicorn.Config, engine: EngineLink) -> None:
        super().__init__(config)
        self._engine = engine

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or not self._engine.alive

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            print(f"ready: http://{host}:{port}/v1", flush=True)


async def run(config: FleetConfig, listener: socket.socket) -> None:
    """Until SIGINT or SIGTERM. Prints a line when requests are answered. Raises FleetError, also
    when the engine has ended by itself.
    """
    engine = EngineLink(config.engine)
    text = Text.read(config.engine.model)
    try:
        await engine.start()
        adapters = Standalone(engine, config)
        await adapters.start()
        server = _Server(
            uvicorn.Config(
                build_app(engine, adapters, text, server_config(config, "local")),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=max(1, round(config.drain_s)),
            ),
            engine,
        )
        await server.serve(sockets=[listener])
        if not engine.alive:
            raise EngineFailed("the engine's process has ended")
    finally:
        await engine.stop()
