"""One replica's membership of the fleet: follows the catalog, publishes its residency and load.

    any event loop ── find, add, remove ──┐        ┌── Catalog ──> Reconciler ──> engine
                                          v        │
                             the membership's own thread and loop
                                                   │
    engine's thread ── residency changed ──────────┴── Publisher ──> Redis

The thread is the membership's own, so that neither a busy HTTP server nor a caller's event loop
delays the lease's renewal.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from cluster.catalog import Catalog
from cluster.config import FleetConfig
from cluster.errors import (
    AdapterFailed,
    BadRequest,
    CatalogUnavailable,
    ConfigError,
    ShuttingDown,
)
from cluster.publisher import Publisher
from cluster.redis_client import connect
from cluster.registry import Registry, newest
from cluster.values import AdapterState, Version
from cluster.versions import check_name
from replica.adapters.validation import Validation
from replica.api.catalog_page import catalog_page
from replica.api.interfaces import Acknowledgement, Claim, Engine
from replica.model.shape import ModelShape, read_shape
from replica.serving.claims import Claims
from replica.serving.reconciler import Reconciler

log = logging.getLogger(__name__)

ACKNOWLEDGED_POLL_S = 0.02
START_POLL_S = 0.1
CANCEL_AGAIN_S = 1.0

Result = TypeVar("Result")


class Membership:
    """`interfaces.Adapters` for a replica of a fleet. Any event loop may await its coroutines.

    run: an id of the fleet's start. The configured adapters are applied once a run, so a replica
    that restarts keeps the API's later changes. None: this replica's start is its own run.
    """

    def __init__(
        self,
        engine: Engine,
        config: FleetConfig,
        replica_id: str,
        *,
        shape: ModelShape | None = None,
        run: str | None = None,
    ) -> None:
        assert config.redis_url is not None
        self._engine = engine
        self._config = config
        self._replica_id = replica_id
        self._run = run or secrets.token_hex(8)
        self._validation = Validation(config, shape or read_shape(config.engine.model))
        self._redis = connect(config.redis_url)
        self._catalog = Catalog(
            self._redis,
            config.name,
            config.engine.base_name,
            restores=True,
            on_change=self._catalog_changed,
        )
        self._registry = Registry(self._redis, config.name)
        self._claims = Claims()
        self._reconciler = Reconciler(
            engine,
            self._validation.store,
            config.engine,
            self._claims,
            lambda: self._publisher.wake(),
        )
        self._publisher = Publisher(
            self._redis,
            config.name,
            replica_id,
            lease_s=config.lease_s,
            report_s=config.report_s,
            residency=self._residency,
            report=engine.report,
            applied=lambda: self._reconciler.applied,
            alive=lambda: engine.alive,
            on_catalog=self._check_behind,
        )
        self._behind_at: int | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="membership", daemon=True
        )

    @property
    def incarnation(self) -> str:
        return self._publisher.incarnation

    @property
    def connected(self) -> bool:
        """True while this replica is subscribed to catalog changes."""
        return self._catalog.connected

    # Callable from any event loop.

    async def start(self) -> None:
        """Returns when the fleet sees this replica with all of the catalog's adapters.

        Raises ConfigError naming the configured adapter that failed, or CatalogUnavailable.
        """
        self._thread.start()
        try:
            await self._on_own_loop(self._start())
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Removes this replica from every view at once. Idempotent. Does not stop the engine."""
        if self._stopping:
            return
        self._stopping = True
        if self._thread.is_alive():
            work = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
            await asyncio.wrap_future(work)
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def find(self, name: str) -> Version | None:
        """Raises AdapterFailed while the files cannot be fetched, and CatalogUnavailable if the
        catalog has never been read.
        """
        return self._registered(name) or await self._on_own_loop(self._find(name))

    async def claim(self, name: str) -> Claim | None:
        while True:
            claim = self._claims.claim(lambda: self._registered(name))
            if claim is not None:
                return claim
            if await self._on_own_loop(self._find(name)) is None:
                return None

    def versions(self) -> list[Version]:
        return self._catalog.book.by_name()

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
        self._catalog.book.check_add(name, load_inplace=load_inplace)
        check = partial(
            self._validation.version, name, path, pinned=pinned, weight=weight, trusted=trusted
        )
        return await self._on_own_loop(self._add(check, load_inplace))

    async def remove(self, name: str) -> Acknowledgement:
        return await self._on_own_loop(self._remove(name))

    async def describe(self) -> dict[str, Any]:
        return await self._on_own_loop(self._describe())

    def _registered(self, name: str) -> Version | None:
        """The name's version, if the engine has it."""
        version = self._catalog.book.get(name)
        return version if version is not None and self._reconciler.has(version.digest) else None

    async def _on_own_loop(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._stopping:
            work.close()
            raise ShuttingDown("the replica is stopping")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopping and not (task and task.cancelling()):
                raise ShuttingDown("the replica is stopping") from None
            raise

    # Everything below runs on the membership's own loop.

    async def _start(self) -> None:
        self._engine.on_residency(self._engine_changed)
        await self._first_sync()
        self._keep(self._catalog.run())
        await self._seed()
        await self._reconciler.wait_idle(self._config.acknowledge_s)
        await self._publisher.publish()
        self._keep(self._publisher.run())

    async def _stop(self) -> None:
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        await self._publisher.close()
        await self._redis.aclose()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("membership: a background task failed", exc_info=task.exception())

    async def _first_sync(self) -> None:
        deadline_s = time.monotonic() + self._config.acknowledge_s
        while True:
            try:
                await self._catalog.resync()
                return
            except CatalogUnavailable:
                if time.monotonic() >= deadline_s:
                    raise
                await asyncio.sleep(START_POLL_S)

    async def _seed(self) -> None:
        """Adds the configured adapters that no other replica of this run has added."""
        if not self._config.adapters:
            return
        seeded = await self._catalog.seeded()
        for name, path in self._config.adapters.items():
            if seeded.get(name) == self._run:
                continue
            try:
                check_name(name, self._config.engine.base_name)
                version = await asyncio.to_thread(
                    self._validation.version, name, path, trusted=True
                )
            except (BadRequest, AdapterFailed) as error:
                key = f"adapters.{name}"
                raise ConfigError(f"{key}: {error.message}", field=key) from error
            await self._catalog.put(version, run=self._run)
        await self._catalog.resync()

    # Names and versions.

    async def _find(self, name: str) -> Version | None:
        version = self._catalog.book.get(name)
        if version is None:
            version = await self._look_up(name)
        if version is None:
            return None
        await self._reconciler.wait_registered(name, version.digest)
        return version

    async def _look_up(self, name: str) -> Version | None:
        try:
            check_name(name, self._config.engine.base_name)
        except BadRequest:
            return None  # an invalid name has no adapter
        try:
            if await self._catalog.lookup(name) is None:
                return None
            await self._catalog.resync()
        except CatalogUnavailable:
            if not self._catalog.synced:
                raise
            # Without Redis, the last catalog that was read stays in force.
        return self._catalog.book.get(name)

    async def _add(self, check: Callable[[], Version], load_inplace: bool) -> Acknowledgement:
        version = await asyncio.to_thread(check)
        versions = self._catalog.book.by_name()
        await asyncio.to_thread(self._validation.check_room, version, versions)
        sequence, _ = await self._catalog.put(version, load_inplace=load_inplace)
        pending = await self._pending(sequence)
        return Acknowledgement(version.name, version.digest, sequence, pending)

    async def _remove(self, name: str) -> Acknowledgement:
        sequence, digest = await self._catalog.remove(name)
        return Acknowledgement(name, digest, sequence, await self._pending(sequence))

    async def _pending(self, sequence: int) -> tuple[str, ...]:
        """Waits for live replicas to apply the change; returns the ids of those that are late."""
        deadline_s = time.monotonic() + self._config.acknowledge_s
        pending: tuple[str, ...] = (self._replica_id,)
        while True:
            try:
                leases = await self._registry.leases()
                pending = tuple(i.replica_id for i in leases if i.catalog_sequence < sequence)
            except CatalogUnavailable:
                pass  # the change is in Redis; which replicas have applied it is unknown
            if not pending or time.monotonic() >= deadline_s:
                return pending
            await asyncio.sleep(ACKNOWLEDGED_POLL_S)

    async def _describe(self) -> dict[str, Any]:
        sequence, versions = await self._catalog.read()
        _, _, live = await self._registry.read()
        held = {lease.incarnation: residency for lease, _, residency in live}
        leases = newest(lease for lease, _, _ in live)
        residency = {lease.replica_id: held[lease.incarnation] for lease in leases}
        replicas = [
            {
                "id": lease.replica_id,
                "incarnation": lease.incarnation,
                "load": dataclasses.asdict(lease.report),
            }
            for lease in leases
        ]
        return catalog_page(versions, sequence, residency, replicas)

    # The engine.

    def _engine_changed(self, entries: list[AdapterState]) -> None:
        """May be called on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the membership has stopped
            self._loop.call_soon_threadsafe(self._publisher.wake)

    def _residency(self) -> list[AdapterState]:
        return self._engine.adapter_states() + self._reconciler.failures()

    def _catalog_changed(self) -> None:
        self._reconciler.update(self._catalog.book.by_name(), self._catalog.book.sequence)
        self._publisher.wake()

    def _check_behind(self, sequence: int) -> None:
        """Resyncs if Redis' sequence differs from ours at two renewals in a row: a lost message."""
        here = self._catalog.book.sequence
        if sequence == here:
            self._behind_at = None
        elif self._behind_at != here:
            self._behind_at = here
        elif self._catalog.connected:
            self._behind_at = None
            self._keep(self._resync())

    async def _resync(self) -> None:
        with contextlib.suppress(CatalogUnavailable):  # the subscription notices and reconnects
            await self._catalog.resync()
