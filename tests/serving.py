"""Shared by tests of the HTTP server: a tokenizer, an in-memory catalog, a live server."""

import asyncio
import functools
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from cluster.errors import BadRequest, FleetError, ModelNotFound
from cluster.values import Version
from replica.api.catalog_page import catalog_page
from replica.api.interfaces import Acknowledgement, Claim, NewAdapter
from replica.api.server import Server, ServerConfig, build_app
from replica.api.text import Text
from tests.models import write_tokenizer
from tests.stub_engine import StubEngine
from tests.until import until

BASE = "tiny"
ADAPTER = Version("poet", "d" * 64, "file:///adapters/poet", rank=8, parameters=1000)
CONFIG = ServerConfig(base=BASE, context=128, vocab=320, replica_id="r-1")


@functools.cache
def text() -> Text:
    """A byte-level tokenizer with a chat template."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        return Text.read(directory)


def tokens_of(words: str) -> tuple[int, ...]:
    return asyncio.run(text().encode(words))


class Book:
    """`replica.api.interfaces.Adapters` in memory. refusal: the error that `add` raises."""

    def __init__(self, *versions: Version) -> None:
        self._versions = {version.name: version for version in versions}
        self.refusal: FleetError | None = None
        self.pending: tuple[str, ...] = ()
        self.failed: dict[str, str] = {}

    async def find(self, name: str) -> Version | None:
        return self._versions.get(name)

    async def claim(self, name: str) -> Claim | None:
        version = self._versions.get(name)
        return None if version is None else Claim(version, lambda: None)

    def versions(self) -> list[Version]:
        return [self._versions[name] for name in sorted(self._versions)]

    async def add(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
        trusted: bool = False,
    ) -> Acknowledgement:
        if self.refusal is not None:
            raise self.refusal
        if name in self._versions and not load_inplace:
            raise BadRequest(f"lora_name: {name!r} is taken", field="lora_name")
        self._versions[name] = replace(ADAPTER, name=name, uri=path, pinned=pinned, weight=weight)
        return Acknowledgement(name, ADAPTER.digest, 1, self.pending, self.failed, ("r-1",))

    async def add_all(
        self, adapters: Sequence[NewAdapter], *, load_inplace: bool = False
    ) -> list[Acknowledgement]:
        return [
            await self.add(
                new.name,
                new.path,
                load_inplace=load_inplace,
                pinned=new.pinned,
                weight=new.weight,
            )
            for new in adapters
        ]

    async def remove(self, name: str) -> Acknowledgement:
        if name not in self._versions:
            raise ModelNotFound(f"lora_name: no adapter {name!r}", field="lora_name")
        version = self._versions.pop(name)
        return Acknowledgement(name, version.digest, 2, self.pending)

    async def describe(self) -> dict[str, Any]:
        return catalog_page(self.versions(), 1, {}, [])


async def app_with(
    engine: StubEngine, book: Book | None = None, config: ServerConfig = CONFIG
) -> Server:
    book = book or Book(ADAPTER)
    for version in book.versions():
        await engine.register(version, version.uri)
    return build_app(engine, book, text(), config)


@asynccontextmanager
async def client_of(app: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, in process."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@asynccontextmanager
async def live(app: Server) -> AsyncIterator[str]:
    """Runs the app under uvicorn on its own thread and port. Yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join)
        listener.close()
