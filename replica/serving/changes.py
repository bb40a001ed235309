"""Changes of the catalog on behalf of one replica: checked, made once, and then who has them.

add ── check files ── check room ── put in Redis ── wait for the replicas ── who could not read
                                       │  ^
                         unsettled     v  │  (see `cluster/recovery.py`)
                                   write back, wait a lease
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence, Set
from functools import partial
from typing import TypeVar

from cluster.catalog import Catalog, Unsettled
from cluster.config import FleetConfig
from cluster.errors import AdapterFailed, BadRequest, CatalogUnavailable, ConfigError
from cluster.recovery import Stamp
from cluster.values import Version
from cluster.versions import check_name
from replica.adapters.validation import Adding, Validation
from replica.api.interfaces import Acknowledgement, NewAdapter
from replica.serving.acknowledgements import Acknowledgements, Answers
from replica.serving.catalog_room import CatalogRoom

POLL_S = 0.1
SEEDED_AT_ONCE = 128
CHECKS_MAX = 4  # threads that read adapter files at once
CHECKED_AT_ONCE = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


class Changes:
    """Belongs to the event loop of its catalog. now_s: a monotonic clock."""

    def __init__(
        self,
        catalog: Catalog,
        acknowledgements: Acknowledgements,
        validation: Validation,
        room: CatalogRoom,
        config: FleetConfig,
        now_s: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._acknowledgements = acknowledgements
        self._validation = validation
        self._room = room
        self._config = config
        self._now_s = now_s

    async def add(
        self, adapters: Sequence[NewAdapter], load_inplace: bool
    ) -> list[Acknowledgement]:
        names = set()
        for new in adapters:
            check_name(new.name, self._config.engine.base_name)
            if new.name in names:
                raise BadRequest(f"lora_name: {new.name!r} comes twice", field="lora_name")
            names.add(new.name)
        with self._validation.adding() as adding:
            versions = await on_threads(partial(_checked, adding), adapters)
            if self._validation.reads_for_room:
                await asyncio.to_thread(self._check_room, versions)
            else:
                self._check_room(versions)
            for version in versions:
                self._catalog.book.check_add(version, load_inplace=load_inplace)
            put = partial(self._catalog.put_all, versions, load_inplace=load_inplace)
            stamp, changed = await self._settled(put)
            digests = {version.digest for version in versions}
            answers = await self._acknowledged(sorted(names), stamp, digests, new=changed)
            if answers.failed and not changed:
                # It was there before, and its files may have been repaired since it failed.
                failed = sorted(set().union(*answers.failed.values()))
                stamp = await self._settled(partial(self._catalog.retry, failed))
                answers = await self._acknowledged((), stamp, digests)
        return [
            _acknowledgement(version, stamp, answers, adding.remarks[version.name])
            for version in versions
        ]

    def _check_room(self, versions: Sequence[Version]) -> None:
        """Raises AdapterRefused. Only the pinned ones and the largest of the others count."""
        others = self._room.others({version.digest for version in versions})
        sizes = {version.name: self._validation.bytes_of(version) for version in versions}
        pinned = [version for version in versions if version.pinned]
        rest = sorted((v for v in versions if not v.pinned), key=lambda v: sizes[v.name])
        seen: set[str] = set()
        for version in [*rest[-1:], *pinned]:
            self._validation.check_room(version, others)
            if version.digest not in seen:
                seen.add(version.digest)
                others.append((sizes[version.name], version.pinned))

    async def remove(self, name: str) -> Acknowledgement:
        stamp, digest = await self._settled(partial(self._catalog.remove, name))
        answers = await self._acknowledged([name], stamp, frozenset())
        return Acknowledgement(name, digest, stamp[1], answers.late, applied=answers.applied)

    async def _settled(self, change: Callable[[], Awaitable[Result]]) -> Result:
        """Makes a change once Redis is settled. The replicas have one lease to settle it."""
        deadline_s = self._now_s() + self._config.lease_s + self._config.acknowledge_s
        while True:
            try:
                return await change()
            except Unsettled as error:
                if self._now_s() >= deadline_s:
                    raise
                await asyncio.sleep(error.retry_after_s or POLL_S)

    async def _acknowledged(
        self, names: Sequence[str], stamp: Stamp, digests: Set[str], *, new: bool = True
    ) -> Answers:
        """What the replicas say of the names' change. new: False if it was made before."""
        deadline_s = self._now_s() + self._config.acknowledge_s
        target = stamp
        while True:
            left_s = max(deadline_s - self._now_s(), 0.0)
            answers = await self._acknowledgements.of(target, digests, left_s, new=new)
            if self._catalog.stamp[0] == target[0]:
                return answers
            # Redis has lost changes meanwhile. Do those who are at its new state have this one?
            with contextlib.suppress(CatalogUnavailable):
                found = await self._catalog.has(names, stamp)
                if found is not None and found[0] == self._catalog.stamp[0]:
                    target = found
                    continue
            if self._now_s() >= deadline_s:
                return Answers((), tuple(sorted({*answers.applied, *answers.late})), {})
            await asyncio.sleep(POLL_S)

    async def seed(self, adding: Adding, run: str) -> None:
        """Adds the configured adapters that no other replica of this run has added.

        Raises ConfigError naming the one that cannot be served.
        """
        if not self._config.adapters:
            return
        adapters = list(self._config.adapters.items())
        starts = list(range(0, len(adapters), SEEDED_AT_ONCE))
        random.shuffle(starts)  # so that replicas that start together share the work
        for start in starts:
            runs = self._catalog.runs()
            chunk = adapters[start : start + SEEDED_AT_ONCE]
            new = [NewAdapter(n, p, trusted=True) for n, p in chunk if runs.get(n) != run]
            if new:
                versions = await self._configured(adding, new)
                await self._settled(partial(self._catalog.put_all, versions, run=run))
        await self._catalog.resync()

    async def _configured(self, adding: Adding, adapters: Sequence[NewAdapter]) -> list[Version]:
        """Raises ConfigError naming the one that cannot be served."""

        def check(new: NewAdapter) -> Version:
            try:
                check_name(new.name, self._config.engine.base_name)
                return _checked(adding, new)
            except (BadRequest, AdapterFailed) as error:
                key = f"adapters.{new.name}"
                raise ConfigError(f"{key}: {error.message}", field=key) from error

        return await on_threads(check, adapters)


def _acknowledgement(
    version: Version, stamp: Stamp, answers: Answers, remarks: Sequence[str]
) -> Acknowledgement:
    failed = {
        replica_id: reasons[version.digest]
        for replica_id, reasons in answers.failed.items()
        if version.digest in reasons
    }
    applied = tuple(replica_id for replica_id in answers.applied if replica_id not in failed)
    late = tuple(replica_id for replica_id in answers.late if replica_id not in failed)
    return Acknowledgement(
        version.name, version.digest, stamp[1], late, failed, applied, tuple(remarks)
    )


def _checked(adding: Adding, new: NewAdapter) -> Version:
    return adding.version(
        new.name, new.path, pinned=new.pinned, weight=new.weight, trusted=new.trusted
    )


async def on_threads(check: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`check` of each item, in their order, on a few threads. Raises what the first one raises."""
    threads = asyncio.Semaphore(CHECKS_MAX)

    async def part(start: int) -> list[Result]:
        async with threads:
            return await asyncio.to_thread(
                lambda: [check(item) for item in items[start : start + CHECKED_AT_ONCE]]
            )

    parts = await asyncio.gather(*(part(i) for i in range(0, len(items), CHECKED_AT_ONCE)))
    return [result for results in parts for result in results]
