"""The book of adapters of one replica alone: `front.Adapters` in memory, without Redis."""

import asyncio
import dataclasses
from typing import Any

from cluster.config import FleetConfig
from cluster.errors import ConfigError, FleetError
from cluster.values import Tier, Version
from cluster.versions import Book, by_digest
from replica.adapters.validation import Validation
from replica.api.catalog_page import catalog_page
from replica.api.interfaces import Acknowledgement, Engine
from replica.model.shape import ModelShape, read_shape


class Standalone:
    """Changes come one at a time; the engine knows a version before its name is in the book."""

    def __init__(
        self,
        engine: Engine,
        config: FleetConfig,
        replica_id: str = "standalone",
        *,
        shape: ModelShape | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._replica_id = replica_id
        self._validation = Validation(config, shape or read_shape(config.engine.model))
        self._book = Book(config.engine.base_name)
        self._paths: dict[str, str] = {}  # of what the engine knows, by digest
        self._change = asyncio.Lock()

    async def start(self) -> None:
        """Registers the adapters of the configuration. Raises ConfigError naming the one."""
        for name, path in self._config.adapters.items():
            try:
                await self.add(name, path, load_inplace=True, trusted=True)
            except FleetError as error:
                key = f"adapters.{name}"
                raise ConfigError(f"{key}: {error.message}", field=key) from error

    async def stop(self) -> None:
        """Nothing to give back; the engine is its owner's."""

    async def find(self, name: str) -> Version | None:
        return self._book.get(name)

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
        async with self._change:
            self._book.check_add(name, load_inplace=load_inplace)
            version = await asyncio.to_thread(
                self._validation.version,
                name,
                path,
                pinned=pinned,
                weight=weight,
                trusted=trusted,
            )
            local = await asyncio.to_thread(
                self._validation.store.fetch, version.uri, version.digest
            )
            before = self._book.get(name)
            others = [other for other in self._book.by_name() if other.name != name]
            await self._tell(by_digest([version, *others])[version.digest], local)
            self._book.add(version, load_inplace=load_inplace)
            if before is not None and before.digest != version.digest:
                await self._settle(before.digest)
            return Acknowledgement(name, version.digest, self._book.sequence)

    async def remove(self, name: str) -> Acknowledgement:
        async with self._change:
            version = self._book.remove(name)
            await self._settle(version.digest)
            return Acknowledgement(name, version.digest, self._book.sequence)

    async def describe(self) -> dict[str, Any]:
        held = {r.digest: r for r in self._engine.adapter_states() if r.tier is not Tier.ABSENT}
        residency = {self._replica_id: held}
        load = dataclasses.asdict(self._engine.report())
        replica = {"id": self._replica_id, "incarnation": self._replica_id, "load": load}
        return catalog_page(self._book.by_name(), self._book.sequence, residency, [replica])

    async def _settle(self, digest: str) -> None:
        """A name of it is gone."""
        left = by_digest(self._book.by_name()).get(digest)
        if left is not None:
            await self._tell(left, self._paths[digest])
        else:
            await self._engine.forget(digest)
            del self._paths[digest]

    async def _tell(self, version: Version, path: str) -> None:
        await self._engine.register(version, path)
        self._paths[version.digest] = path
