"""Registers and forgets versions in the engine until it matches the catalog, one task a version.

in the catalog, not registered ──> fetch ──> engine.register ──> registered
                                     └── fails ──> failed; retried by a request after a backoff
registered, not in the catalog ──> no request claims it ──> engine.forget ──> absent
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable

from cluster.config import EngineConfig
from cluster.errors import AdapterFailed, FleetError
from cluster.store import Store
from cluster.values import AdapterState, Tier, Version
from cluster.versions import by_digest
from replica.api.interfaces import Engine
from replica.serving.claims import Claims

log = logging.getLogger(__name__)

FETCHES_MAX = 4
ARRIVAL_WAIT_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    since_s: float
    retry_at_s: float
    wait_s: float


@dataclasses.dataclass(slots=True)
class _Task:
    """sequence: the catalog change that counts as applied once this task ends; None: no change."""

    task: asyncio.Task[None]
    sequence: int | None


class Reconciler:
    """Belongs to one event loop, except `has`. on_task_done: called when a task has ended."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        config: EngineConfig,
        claims: Claims,
        on_task_done: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._config = config
        self._claims = claims
        self._on_task_done = on_task_done
        self._sequence = 0
        self._desired: dict[str, Version] = {}
        self._registered: dict[str, Version] = {}
        self._failed: dict[str, _Failure] = {}
        self._tasks: dict[str, _Task] = {}
        self._fetches = asyncio.Semaphore(FETCHES_MAX)

    def has(self, digest: str) -> bool:
        """True if the engine has the version. May be called on any thread."""
        return digest in self._registered

    @property
    def applied(self) -> int:
        """The latest sequence up to which every catalog change is in the engine or has failed."""
        waits = [task.sequence for task in self._tasks.values() if task.sequence is not None]
        return min(waits, default=self._sequence + 1) - 1

    def failures(self) -> list[AdapterState]:
        """The versions that the engine lacks because their files could not be fetched."""
        return [
            AdapterState(digest, Tier.FAILED, 0, failure.since_s, failure.reason)
            for digest, failure in self._failed.items()
            if digest not in self._registered
        ]

    def update(self, versions: Iterable[Version], sequence: int) -> None:
        """Starts the tasks that bring the engine to this state of the catalog."""
        desired = by_digest(versions)
        self._desired, self._sequence = desired, sequence
        self._failed = {d: failure for d, failure in self._failed.items() if d in desired}
        for digest in sorted(desired.keys() | self._registered.keys()):
            if desired.get(digest) != self._registered.get(digest):
                self._reconcile(digest, sequence)

    async def wait_idle(self, timeout_s: float) -> None:
        """Returns when the tasks that run now have ended, or after `timeout_s`."""
        tasks = [task.task for task in self._tasks.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def wait_registered(self, name: str, digest: str) -> None:
        """Returns when the engine has the version. Retries a failure whose backoff is over.

        Raises AdapterFailed.
        """
        failure = self._failed.get(digest)
        if failure is not None and time.monotonic() >= failure.retry_at_s:
            self._reconcile(digest, None)
        running = self._tasks.get(digest)
        if running is not None:
            await asyncio.wait([running.task], timeout=ARRIVAL_WAIT_S)
        if digest in self._registered:
            return
        failure = self._failed.get(digest)
        reason = failure.reason if failure else "its files are still being fetched"
        wait_s = failure.retry_at_s - time.monotonic() if failure else 1.0
        raise AdapterFailed(f"{name}: {reason}", field="model", retry_after_s=max(wait_s, 1.0))

    def _reconcile(self, digest: str, sequence: int | None) -> None:
        running = self._tasks.get(digest)
        if running is None:
            self._tasks[digest] = _Task(asyncio.create_task(self._run(digest)), sequence)
        elif running.sequence is None:
            running.sequence = sequence  # the task compares again before it ends

    async def _run(self, digest: str) -> None:
        try:
            while self._desired.get(digest) != self._registered.get(digest):
                version = self._desired.get(digest)
                if version is not None:
                    await self._register(version)
                elif self._claims.held(digest):
                    await self._claims.wait_free(digest)
                else:
                    del self._registered[digest]  # first, so that no request claims it any more
                    await self._engine.forget(digest)
            self._failed.pop(digest, None)
        except (FleetError, OSError) as error:
            self._fail(digest, str(error))
        finally:
            del self._tasks[digest]
            self._on_task_done()

    async def _register(self, version: Version) -> None:
        async with self._fetches:
            path = await asyncio.to_thread(self._store.fetch, version.uri, version.digest)
        await self._engine.register(version, path)
        self._registered[version.digest] = version

    def _fail(self, digest: str, reason: str) -> None:
        log.warning("adapter %s: %s", digest[:12], reason)
        before = self._failed.get(digest)
        if before is None:
            wait_s, since_s = self._config.load_retry_s, time.time()
        else:
            wait_s = min(before.wait_s * 2, self._config.load_retry_max_s)
            since_s = before.since_s
        self._failed[digest] = _Failure(reason, since_s, time.monotonic() + wait_s, wait_s)
