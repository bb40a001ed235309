"""The adapter catalog of a single process: `interfaces.Adapters` in memory, without Redis."""

import asyncio
import dataclasses
from typing import Any

from cluster.config import FleetConfig
from cluster.errors import ConfigError, FleetError
from cluster.values import Tier, Version
from cluster.versions import Book, by_digest
from replica.adapters.validation import Validation
from replica.api.catalog_page import catalog_page
from replica.api.interfaces import Acknowledgement, Claim, Engine
from replica.model.shape import ModelShape, read_shape
from replica.serving.claims import Claims


class LocalCatalog:
    """Serializes changes. A version is registered with the engine before its name is published."""

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
        self._paths: dict[str, str] = {}  # digest → files, for versions the engine has
        self._change = asyncio.Lock()
        self._claims = Claims()

    async def start(self) -> None:
        """Registers the configured adapters. Raises ConfigError naming the one that failed."""
        for name, path in self._config.adapters.items():
            try:
                await self.add(name, path, load_inplace=True, trusted=True)
            except FleetError as error:
                key = f"adapters.{name}"
                raise ConfigError(f"{key}: {error.message}", field=key) from error

    async def stop(self) -> None:
        """Releases nothing: the engine belongs to the caller."""

    async def find(self, name: str) -> Version | None:
        return self._book.get(name)

    async def claim(self, name: str) -> Claim | None:
        return self._claims.claim(lambda: self._book.get(name))

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
            await self._register(by_digest([version, *others])[version.digest], local)
            self._book.add(version, load_inplace=load_inplace)
            if before is not None and before.digest != version.digest:
                await self._name_removed(before.digest)
            return Acknowledgement(name, version.digest, self._book.sequence)

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

    async def _name_removed(self, digest: str) -> None:
        """Forgets the version with its last name; else its pin and weight may have changed."""
        remaining = by_digest(self._book.by_name()).get(digest)
        if remaining is not None:
            await self._register(remaining, self._paths[digest])
        else:
            await self._claims.wait_free(digest)
            await self._engine.forget(digest)
            del self._paths[digest]

    async def _register(self, version: Version, path: str) -> None:
        await self._engine.register(version, path)
        self._paths[version.digest] = path
