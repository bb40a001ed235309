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
import concurrent.futures
import contextlib
import dataclasses
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence, Set
from typing import Any, TypeVar

from cluster.catalog import Catalog
from cluster.config import FleetConfig
from cluster.downloads import Peer
from cluster.errors import (
    AdapterFailed,
    CatalogUnavailable,
    ConfigError,
    ShuttingDown,
)
from cluster.publisher import Publisher
from cluster.recovery import Stamp
from cluster.redis_client import check_reachable, connect
from cluster.registry import Lease, Registry, newest
from cluster.uploads import Upload
from cluster.values import AdapterState, AddedToken, Version
from cluster.versions import is_name
from replica.adapters.chat_files import BaseText
from replica.adapters.validation import Validation
from replica.api.catalog_page import catalog_page
from replica.api.interfaces import Acknowledgement, Claim, Engine, NewAdapter
from replica.model.checkpoint import shape_of
from replica.model.shape import Shape
from replica.serving.acknowledgements import Acknowledgements
from replica.serving.catalog_room import CatalogRoom
from replica.serving.changes import Changes
from replica.serving.claims import Claims
from replica.serving.held_files import HeldFiles
from replica.serving.reconciler import Reconciler
from replica.serving.sources import Sources

log = logging.getLogger(__name__)

START_POLL_S = 0.1
CANCEL_AGAIN_S = 1.0
# Longer than Redis takes to answer, or not to.
PEERS_S = 30.0


Result = TypeVar("Result")


class Membership:
    """`interfaces.Adapters` for a replica of a fleet. Any event loop may await its coroutines.

    run: an id of the fleet's start. The configured adapters are applied once a run, so a replica
    that restarts keeps the API's later changes. None: this replica's start is its own run. url: of
    its server, for other replicas; "" while it is not known. text: see `Validation`.
    """

    def __init__(
        self,
        engine: Engine,
        config: FleetConfig,
        replica_id: str,
        *,
        shape: Shape | None = None,
        run: str | None = None,
        url: Callable[[], str] = lambda: "",
        text: BaseText | None = None,
    ) -> None:
        assert config.redis_url is not None
        self._engine = engine
        self._config = config
        self._run = run or secrets.token_hex(8)
        shape = shape or shape_of(config.engine.model)
        self._validation = Validation(config, shape, self._peers, text)
        self._files_key = secrets.token_urlsafe(32)
        self._redis = connect(config.redis_url)
        self._catalog = Catalog(
            self._redis,
            config.name,
            config.engine.base_name,
            lease_s=config.lease_s,
            on_change=self._catalog_changed,
        )
        self._registry = Registry(self._redis, config.name)
        self._claims = Claims()
        self._reconciler = Reconciler(
            HeldFiles(engine, self._validation.store, self._catalog.book),
            config.engine,
            self._claims,
            self._catalog.book.of_digest,
            lambda entries: self._publisher.changed(entries),
            lambda: self._publisher.wake(),
        )
        self._room = CatalogRoom(self._validation.bytes_of)
        self._acknowledgements = Acknowledgements(
            self._redis, config.name, replica_id, config.lease_s, lambda: time.monotonic()
        )
        self._changes = Changes(
            self._catalog,
            self._acknowledgements,
            self._validation,
            self._room,
            config,
            lambda: time.monotonic(),
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
            url=url,
            files_key=self._files_key,
        )
        self._replica_id = replica_id
        base_name, now = config.engine.base_name, lambda: time.monotonic()
        self._sources = Sources(config.adapter_sources, base_name, self._add_found, now)
        self._behind_at: Stamp | None = None
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
            known = await self._on_own_loop(self._find(name)) is not None
            if not known and not await self._on_own_loop(self._sources.resolve(name)):
                return None

    def chat_template(self, digest: str) -> str:
        return self._validation.chat_template(digest)

    def added_tokens(self, digest: str) -> list[AddedToken]:
        return self._validation.added_tokens(digest)

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
        new = NewAdapter(name, path, pinned, weight, trusted)
        (done,) = await self.add_all([new], load_inplace=load_inplace)
        return done

    async def add_all(
        self, adapters: Sequence[NewAdapter], *, load_inplace: bool = False
    ) -> list[Acknowledgement]:
        return await self._on_own_loop(self._changes.add(adapters, load_inplace))

    async def remove(self, name: str) -> Acknowledgement:
        return await self._on_own_loop(self._changes.remove(name))

    async def describe(self) -> dict[str, Any]:
        return await self._on_own_loop(self._describe())

    async def others(self) -> dict[str, str]:
        """Replica id → URL of its server, of all other live ones. Raises CatalogUnavailable."""
        return {lease.replica_id: lease.url for lease in await self._on_own_loop(self._others())}

    def upload(self) -> Upload:
        return Upload(self._validation.store)

    def files(self, key: str, digest: str) -> str | None:
        """The directory of a version's files, for a replica that has read this one's key."""
        same = hmac.compare_digest(key.encode(), self._files_key.encode())
        return self._validation.store.find(digest) if same else None

    def _peers(self) -> list[Peer]:
        """Blocks a thread of the store's."""
        try:
            found = asyncio.run_coroutine_threadsafe(self._others(), self._loop)
            return [Peer(lease.url, lease.files_key) for lease in found.result(PEERS_S)]
        except (TimeoutError, RuntimeError, concurrent.futures.CancelledError) as error:
            raise ShuttingDown("the replica is stopping") from error

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
        await asyncio.to_thread(self._warn_of_risks)
        self._keep(self._catalog.run())
        self._keep(self._acknowledgements.run())
        with self._validation.adding() as adding:
            await self._changes.seed(adding, self._run)
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
        self._validation.store.close()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("membership: a background task failed", exc_info=task.exception())

    def _warn_of_risks(self) -> None:
        assert self._config.redis_url is not None
        with contextlib.suppress(ConfigError):  # it went away again
            for risk in check_reachable(self._config.redis_url):
                log.warning("the fleet's Redis: %s", risk)

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

    # Names and versions.

    async def _find(self, name: str) -> Version | None:
        while True:
            version = self._catalog.book.get(name) or await self._look_up(name)
            if version is None:
                return None
            try:
                await self._reconciler.wait_registered(name, version.digest)
                return version
            except AdapterFailed:
                now = self._catalog.book.get(name)
                if now is not None and now.digest == version.digest:
                    raise
                # The name was re-pointed or removed meanwhile.

    async def _add_found(self, name: str, path: str) -> None:
        await self._changes.add([NewAdapter(name, path, trusted=True)], False)

    async def _look_up(self, name: str) -> Version | None:
        if not is_name(name, self._config.engine.base_name):
            return None
        try:
            if await self._catalog.lookup(name) is None:
                return None
            await self._catalog.resync()
        except CatalogUnavailable:
            if not self._catalog.synced:
                raise
            # Without Redis, the last catalog that was read stays in force.
        return self._catalog.book.get(name)

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

    async def _others(self) -> list[Lease]:
        _, _, live = await self._registry.read()
        leases = newest(lease for lease, _, _ in live)
        return [each for each in leases if each.url and each.replica_id != self._replica_id]

    # The engine.

    def _engine_changed(self, entries: list[AdapterState]) -> None:
        """May be called on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the membership has stopped
            self._loop.call_soon_threadsafe(self._states_changed, entries)

    def _states_changed(self, entries: list[AdapterState]) -> None:
        self._publisher.changed(entries)
        if not all(self._reconciler.busy(entry.digest) for entry in entries):
            self._publisher.wake()  # else the reconciler's task does so at its end

    def _residency(self) -> list[AdapterState]:
        return self._engine.adapter_states() + self._reconciler.failures()

    def _catalog_changed(self, digests: Set[str], again: Set[str]) -> None:
        book, stamp = self._catalog.book, self._catalog.stamp
        self._room.update({digest: book.of_digest(digest) for digest in digests})
        failing = {digest for digest in again if self._publisher.fails(digest)}
        self._reconciler.update(digests, stamp, failing)
        if self._reconciler.applied == stamp:
            self._publisher.wake()  # else its tasks will

    def _check_behind(self, stamp: Stamp, settled: bool) -> None:
        """Resyncs if Redis' state differs from ours at two renewals in a row: a lost message, or
        lost changes.
        """
        here = self._catalog.stamp
        if (settled and stamp == here) or (not settled and self._catalog.settles_in_s is not None):
            self._behind_at = None
        elif self._behind_at != here:
            self._behind_at = here
        elif self._catalog.connected:
            self._behind_at = None
            self._keep(self._resync())

    async def _resync(self) -> None:
        with contextlib.suppress(CatalogUnavailable):  # the subscription notices and reconnects
            await self._catalog.resync()
