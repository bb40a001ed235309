"""Registers and forgets versions in the engine until it matches the catalog, one task a version.

in the catalog, not registered ──> files.register ──> registered
                                     └── fails ──> failed; retried by a request after a backoff,
                                                   or when its files may have been repaired
registered, not in the catalog ──> no request claims it ──> files.forget ──> absent
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable

from cluster.config import EngineConfig
from cluster.errors import AdapterFailed, FleetError
from cluster.recovery import Stamp
from cluster.values import AdapterState, Tier, Version
from replica.serving.claims import Claims
from replica.serving.held_files import HeldFiles

log = logging.getLogger(__name__)

ARRIVAL_WAIT_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    since_s: float
    retry_at_s: float
    wait_s: float
    seen: object  # of the files that were tried


@dataclasses.dataclass(slots=True)
class _Task:
    """before: the catalog's state that counts as applied until this task ends; None: no change."""

    task: asyncio.Task[None]
    before: Stamp | None


class Reconciler:
    """Belongs to one event loop, except `has`.

    desired: the catalog's version of a digest. on_failures: called with the states of versions that
    could not be fetched, and with ABSENT ones when they are no longer wanted. on_task_done: called
    when a task has ended.
    """

    def __init__(
        self,
        files: HeldFiles,
        config: EngineConfig,
        claims: Claims,
        desired: Callable[[str], Version | None],
        on_failures: Callable[[Iterable[AdapterState]], None],
        on_task_done: Callable[[], None],
    ) -> None:
        self._files = files
        self._config = config
        self._claims = claims
        self._desired = desired
        self._on_failures = on_failures
        self._on_task_done = on_task_done
        self._stamp: Stamp = (0, 0)
        self._registered: dict[str, Version] = {}
        self._failed: dict[str, _Failure] = {}
        self._tasks: dict[str, _Task] = {}
        self._again: set[str] = set()  # to register though they are registered

    def has(self, digest: str) -> bool:
        """True if the engine has the version. May be called on any thread."""
        return digest in self._registered

    def busy(self, digest: str) -> bool:
        """True while a task works on the version."""
        return digest in self._tasks

    @property
    def applied(self) -> Stamp:
        """The latest state of the catalog of which every change is in the engine or has failed."""
        waits = [task.before for task in self._tasks.values() if task.before is not None]
        return min(waits, default=self._stamp)

    def failures(self) -> list[AdapterState]:
        """The versions that the engine lacks because their files could not be fetched."""
        return [
            _failed_state(digest, failure)
            for digest, failure in self._failed.items()
            if digest not in self._registered
        ]

    def update(
        self, digests: Iterable[str], stamp: Stamp, again: Collection[str] = frozenset()
    ) -> None:
        """Starts the tasks that bring the engine to this state of the catalog. digests: those whose
        versions may have changed. again: those that failed, but whose files may be repaired.
        """
        before, self._stamp = self._stamp, stamp
        for digest in sorted({*digests, *again}):
            desired = self._desired(digest)
            failed = self._failed.pop(digest, None) if desired is None else None
            if failed is not None and digest not in self._registered:
                self._on_failures([AdapterState(digest, Tier.ABSENT, 0, 0.0)])
            if desired is not None and digest in again:
                self._again.add(digest)
            if desired != self._registered.get(digest) or digest in self._again:
                self._reconcile(digest, before)

    async def wait_idle(self, timeout_s: float) -> None:
        """Returns when the tasks that run now have ended, or after `timeout_s`."""
        tasks = [task.task for task in self._tasks.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def wait_registered(self, name: str, digest: str) -> None:
        """Returns when the engine has the version. Retries a failure whose backoff is over, or
        whose files have changed.

        Raises AdapterFailed.
        """
        failure = self._failed.get(digest)
        if failure is not None:
            due = time.monotonic() >= failure.retry_at_s
            if due or await self._seen(self._desired(digest)) != failure.seen:
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

    def _reconcile(self, digest: str, before: Stamp | None) -> None:
        running = self._tasks.get(digest)
        if running is None:
            self._tasks[digest] = _Task(asyncio.create_task(self._run(digest)), before)
        elif running.before is None:
            running.before = before  # the task compares again before it ends

    async def _run(self, digest: str) -> None:
        try:
            while self._differs(digest):
                version = self._desired(digest)
                try:
                    await self._follow(digest, version)
                except (FleetError, OSError) as error:
                    seen = await self._seen(version)
                    if self._desired(digest) == version:  # else the catalog has changed meanwhile
                        if version is not None:
                            self._fail(digest, str(error), seen)
                        return
            self._failed.pop(digest, None)
        finally:
            del self._tasks[digest]
            self._on_task_done()

    def _differs(self, digest: str) -> bool:
        desired = self._desired(digest)
        if desired is None:
            self._again.discard(digest)
        return desired != self._registered.get(digest) or digest in self._again

    async def _seen(self, version: Version | None) -> object:
        return None if version is None else await self._files.seen(version)

    async def _follow(self, digest: str, version: Version | None) -> None:
        if version is not None:
            again = digest in self._again
            self._again.discard(digest)
            await self._files.register(version, again=again)
            self._registered[digest] = version
        elif self._claims.held(digest):
            await self._claims.wait_free(digest)
        else:
            del self._registered[digest]  # first, so that no request claims it any more
            await self._files.forget(digest)

    def _fail(self, digest: str, reason: str, seen: object) -> None:
        log.warning("adapter %s: %s", digest[:12], reason)
        before = self._failed.get(digest)
        if before is None:
            wait_s, since_s = self._config.load_retry_s, time.time()
        else:
            wait_s = min(before.wait_s * 2, self._config.load_retry_max_s)
            since_s = before.since_s
        failure = _Failure(reason, since_s, time.monotonic() + wait_s, wait_s, seen)
        self._failed[digest] = failure
        if digest not in self._registered:
            self._on_failures([_failed_state(digest, failure)])


def _failed_state(digest: str, failure: _Failure) -> AdapterState:
    return AdapterState(digest, Tier.FAILED, 0, failure.since_s, failure.reason)
