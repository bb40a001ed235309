"""The adapter catalog of a single process: `interfaces.Adapters` in memory, without Redis."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.config import FleetConfig
from cluster.errors import ConfigError, FleetError
from cluster.uploads import Upload
from cluster.values import AddedToken, Tier, Version
from cluster.versions import Book, merged
from replica.adapters.chat_files import BaseText
from replica.adapters.validation import Validation
from replica.api.catalog_page import catalog_page
from replica.api.interfaces import Acknowledgement, Claim, Engine, NewAdapter
from replica.model.checkpoint import shape_of
from replica.model.shape import Shape
from replica.serving.claims import Claims
from replica.serving.held_files import HeldFiles
from replica.serving.sources import Sources

# Adapters that are read at once, when they are added.
READERS = 4


class LocalCatalog:
    """Serializes changes. A version is registered with the engine before its name is published.

    text: see `Validation`.
    """

    def __init__(
        self,
        engine: Engine,
        config: FleetConfig,
        replica_id: str = "standalone",
        *,
        shape: Shape | None = None,
        text: BaseText | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._replica_id = replica_id
        shape = shape or shape_of(config.engine.model)
        self._validation = Validation(config, shape, text=text)
        self._book = Book(config.engine.base_name)
        self._files = HeldFiles(engine, self._validation.store, self._book)
        # Threads of their own, because a chat template may take seconds, and chats need the others.
        self._readers = ThreadPoolExecutor(READERS, "adding")
        self._change = asyncio.Lock()
        self._claims = Claims()
        base_name, now = config.engine.base_name, lambda: time.monotonic()
        self._sources = Sources(config.adapter_sources, base_name, self._add_found, now)

    async def start(self) -> None:
        """Registers the configured adapters. Raises ConfigError naming the one that failed."""
        for name, path in self._config.adapters.items():
            try:
                await self.add(name, path, load_inplace=True, trusted=True)
            except FleetError as error:
                key = f"adapters.{name}"
                raise ConfigError(f"{key}: {error.message}", field=key) from error

    async def stop(self) -> None:
        """Releases the store's files, but not the engine, which belongs to the caller."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._validation.store.close()

    async def find(self, name: str) -> Version | None:
        return self._book.get(name)

    async def claim(self, name: str) -> Claim | None:
        claim = self._claims.claim(lambda: self._book.get(name))
        if claim is None and await self._sources.resolve(name):
            claim = self._claims.claim(lambda: self._book.get(name))
        return claim

    def chat_template(self, digest: str) -> str:
        return self._validation.chat_template(digest)

    def added_tokens(self, digest: str) -> list[AddedToken]:
        return self._validation.added_tokens(digest)

    def versions(self) -> list[Version]:
        return self._book.by_name()

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
        with self._validation.adding() as adding:
            read = functools.partial(
                adding.version, name, path, pinned=pinned, weight=weight, trusted=trusted
            )
            version = await asyncio.get_running_loop().run_in_executor(self._readers, read)
            async with self._change:
                self._book.check_add(version, load_inplace=load_inplace)
                before = self._book.get(name)
                others = self._book.names_of(version.digest)
                again = self._fails(version.digest)
                await self._files.register(merged({**others, name: version}), again=again)
                self._book.add(version, load_inplace=load_inplace)
                if before is not None and before.digest != version.digest:
                    await self._name_removed(before.digest)
                remarks = tuple(adding.remarks[name])
                return Acknowledgement(name, version.digest, self._book.sequence, remarks=remarks)

    async def _add_found(self, name: str, path: str) -> None:
        await self.add(name, path, trusted=True)

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
                trusted=new.trusted,
            )
            for new in adapters
        ]

    def upload(self) -> Upload:
        return Upload(self._validation.store)

    async def remove(self, name: str) -> Acknowledgement:
        async with self._change:
            version = self._book.remove(name)
            await self._name_removed(version.digest)
            return Acknowledgement(name, version.digest, self._book.sequence)

    async def describe(self) -> dict[str, Any]:
        held = {r.digest: r for r in self._engine.adapter_states() if r.tier is not Tier.ABSENT}
        residency = {self._replica_id: held}
        load = dataclasses.asdict(self._engine.report())
        replica = {"id": self._replica_id, "incarnation": self._replica_id, "load": load}
        return catalog_page(self._book.by_name(), self._book.sequence, residency, [replica])

    def _fails(self, digest: str) -> bool:
        states = self._engine.adapter_states()
        return any(each.digest == digest and each.tier is Tier.FAILED for each in states)

    async def _name_removed(self, digest: str) -> None:
        """Forgets the version with its last name; else its pin and weight may have changed."""
        remaining = self._book.of_digest(digest)
        if remaining is not None:
            await self._files.register(remaining)
        else:
            await self._claims.wait_free(digest)
            await self._files.forget(digest)
