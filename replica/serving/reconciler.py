"""Brings the engine to what the catalog wants, one task a version.

wanted, not had ──> fetch ──> engine.register ──> had
                      └── fails ──> failed, tried again when asked for after a while
had, not wanted ──> engine.forget ──> gone
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

log = logging.getLogger(__name__)

FETCHES_MAX = 4
FORGET_AFTER_S = 1.0
ARRIVAL_WAIT_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    since_s: float
    retry_at_s: float
    wait_s: float


@dataclasses.dataclass(slots=True)
class _Task:
    """sequence: the change that is not applied before this ends, if any waits for it."""

    task: asyncio.Task[None]
    sequence: int | None


class Settling:
    """Belongs to one event loop, except `has`. on_settled: called when a task has ended."""

    def __init__(
        self, engine: Engine, store: Store, config: EngineConfig, on_settled: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._store = store
        self._config = config
        self._on_settled = on_settled
        self._sequence = 0
        self._names: dict[str, str] = {}
        self._wanted: dict[str, Version] = {}
        self._had: dict[str, Version] = {}
        self._failed: dict[str, _Failure] = {}
        self._tasks: dict[str, _Task] = {}
        self._fetches = asyncio.Semaphore(FETCHES_MAX)

    def has(self, digest: str) -> bool:
        """Whether the engine may be asked for it. May be called on any thread."""
        return digest in self._had

    @property
    def applied(self) -> int:
        """Every change of the catalog up to this one has reached the engine, or failed to."""
        waits = [task.sequence for task in self._tasks.values() if task.sequence is not None]
        return min(waits, default=self._sequence + 1) - 1

    def failures(self) -> list[AdapterState]:
        """What the engine never heard of because its files could not be had."""
        return [
            AdapterState(digest, Tier.FAILED, 0, failure.since_s, failure.reason)
            for digest, failure in self._failed.items()
            if digest not in self._had
        ]

    def follow(self, versions: Iterable[Version], sequence: int) -> None:
        """The catalog says this now."""
        versions = list(versions)
        wanted = by_digest(versions)
        names = {version.name: version.digest for version in versions}
        repointed = {old for name, old in self._names.items() if names.get(name, old) != old}
        self._wanted, self._names, self._sequence = wanted, names, sequence
        self._failed = {d: failure for d, failure in self._failed.items() if d in wanted}
        for digest in sorted(wanted.keys() | self._had.keys()):
            if wanted.get(digest) == self._had.get(digest):
                continue
            if digest in repointed and digest not in wanted:
                # Requests that read the name just before are still on their way to the engine.
                loop = asyncio.get_running_loop()
                loop.call_later(FORGET_AFTER_S, self._settle, digest, None)
            else:
                self._settle(digest, sequence)

    async def settled(self, timeout_s: float) -> None:
        """Until nothing is under way, or as long as that."""
        tasks = [task.task for task in self._tasks.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def arrival(self, name: str, digest: str) -> None:
        """Until the engine may be asked for it. Raises AdapterFailed."""
        failure = self._failed.get(digest)
        if failure is not None and time.monotonic() >= failure.retry_at_s:
            self._settle(digest, None)
        under_way = self._tasks.get(digest)
        if under_way is not None:
            await asyncio.wait([under_way.task], timeout=ARRIVAL_WAIT_S)
        if digest in self._had:
            return
        failure = self._failed.get(digest)
        reason = failure.reason if failure else "its files are still being fetched"
        wait_s = failure.retry_at_s - time.monotonic() if failure else 1.0
        raise AdapterFailed(f"{name}: {reason}", field="model", retry_after_s=max(wait_s, 1.0))

    def _settle(self, digest: str, sequence: int | None) -> None:
        under_way = self._tasks.get(digest)
        if under_way is None:
            self._tasks[digest] = _Task(asyncio.create_task(self._run(digest)), sequence)
        elif under_way.sequence is None:
            under_way.sequence = sequence  # it looks again before it ends

    async def _run(self, digest: str) -> None:
        try:
            while self._wanted.get(digest) != self._had.get(digest):
                version = self._wanted.get(digest)
                if version is not None:
                    await self._bring(version)
                else:
                    await self._engine.forget(digest)
                    del self._had[digest]
            self._failed.pop(digest, None)
        except (FleetError, OSError) as error:
            self._fail(digest, str(error))
        finally:
            del self._tasks[digest]
            self._on_settled()

    async def _bring(self, version: Version) -> None:
        async with self._fetches:
            path = await asyncio.to_thread(self._store.fetch, version.uri, version.digest)
        await self._engine.register(version, path)
        self._had[version.digest] = version

    def _fail(self, digest: str, reason: str) -> None:
        log.warning("adapter %s: %s", digest[:12], reason)
        before = self._failed.get(digest)
        if before is None:
            wait_s, since_s = self._config.load_retry_s, time.time()
        else:
            wait_s = min(before.wait_s * 2, self._config.load_retry_max_s)
            since_s = before.since_s
        self._failed[digest] = _Failure(reason, since_s, time.monotonic() + wait_s, wait_s)
