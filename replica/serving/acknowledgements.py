"""Waits until the live replicas have applied a change of the catalog.

Each replica says on a channel what it has applied, and whether there are versions that it cannot
serve. When all that were alive at a look of the last POLL_S have said that they have the change and
can serve everything, it is answered. Else, or after POLL_S without a message, the leases are read:
they decide, for a message may be lost, and a replica may have died or started. One read answers all
changes that wait. If Redis has lost leases, the replicas have one lease to publish theirs again
before a change is answered.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from cluster.errors import CatalogUnavailable
from cluster.recovery import Stamp
from cluster.redis_client import Subscription
from cluster.registry import Registry, acknowledgements

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Answers:
    """What the live replicas say of a change, by their ids.

    applied: they have followed. late: they have not. failed: replica id → digest → why it could not
    be read there.
    """

    applied: tuple[str, ...]
    late: tuple[str, ...]
    failed: Mapping[str, Mapping[str, str]]


class Acknowledgements:
    """Belongs to one event loop. now_s: a monotonic clock."""

    def __init__(
        self,
        redis: Redis,
        fleet: str,
        replica_id: str,
        lease_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._registry = Registry(redis, fleet)
        self._replica_id = replica_id
        self._lease_s = lease_s
        self._now_s = now_s
        self._seen: tuple[str, int] | None = None  # epoch and sequence at the last look
        self._lost_until_s: float | None = (
            None  # leases that Redis has lost may come back till then
        )
        self._looked_s: float | None = None  # on the loop's clock; None: someone has started since
        self._alive: dict[str, str] = {}  # at the last look: incarnation → replica id
        self._applied: dict[str, Stamp] = {}  # by incarnation
        self._served: dict[str, Stamp] = {}  # by incarnation: when it said that nothing failed
        self._failed: dict[str, dict[str, str]] = {}
        self._digests: Counter[str] = Counter()  # of the changes that wait
        self._news = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._subscription = Subscription(
            redis, acknowledgements(redis, fleet), apply=self._heard, resync=self._read
        )

    async def run(self) -> None:
        await self._subscription.run()

    async def of(
        self, stamp: Stamp, digests: Set[str], timeout_s: float, *, new: bool = True
    ) -> Answers:
        """Waits until the live replicas have applied the state. digests: of the change. new: False
        if they may have failed after a replica said that it has this state.
        """
        self._digests.update(digests)
        try:
            return await self._wait(stamp, digests, timeout_s, new)
        finally:
            self._digests.subtract(digests)
            self._digests += Counter()  # drops those at 0

    async def _wait(self, stamp: Stamp, digests: Set[str], timeout_s: float, new: bool) -> Answers:
        deadline_s = self._now_s() + timeout_s
        answers = Answers((), (self._replica_id,), {})
        while True:
            news = self._news
            if new and self._all_serve(stamp):
                return Answers(tuple(self._alive.values()), (), {})
            told = all(self._applied[incarnation] >= stamp for incarnation in self._alive)
            if told or not await _came(news, POLL_S):
                try:
                    await self._read()
                except CatalogUnavailable:
                    await asyncio.sleep(POLL_S)  # the change is in Redis; who has applied it?
                else:
                    answers = self._answers(stamp, digests)
                complete = not answers.late and self._lost_until_s is None
                if complete or self._now_s() >= deadline_s:
                    return answers

    def _all_serve(self, stamp: Stamp) -> bool:
        """True if all have said that they have the change, and that they can serve everything."""
        if self._looked_s is None or _loop_s() - self._looked_s >= POLL_S:
            return False
        known = self._lost_until_s is None and self._replica_id in self._alive.values()
        return known and all(self._served.get(i, (0, 0)) >= stamp for i in self._alive)

    def _answers(self, stamp: Stamp, digests: Set[str]) -> Answers:
        late = [r for i, r in self._alive.items() if self._applied[i] < stamp]
        if self._replica_id not in self._alive.values():
            late.append(self._replica_id)  # Redis has lost its lease, and whose else?
        failed = {
            replica_id: {digest: why for digest, why in reasons.items() if digest in digests}
            for replica_id, reasons in self._failed.items()
        }
        return Answers(
            tuple(r for r in self._alive.values() if r not in late),
            tuple(late),
            {replica_id: reasons for replica_id, reasons in failed.items() if reasons},
        )

    async def _read(self) -> None:
        """Joins a read that has not begun yet."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_standing())
        await asyncio.shield(self._reading)

    async def _read_standing(self) -> None:
        await asyncio.sleep(0)  # those that the same message woke join this read
        self._reading = None
        self._looked_s = _loop_s()
        seen, standing = await self._registry.standing(sorted(self._digests))
        before = self._applied
        leases = [standing[replica_id][0] for replica_id in sorted(standing)]
        alive = {lease.incarnation: lease.replica_id for lease in leases}
        if self._has_lost(seen, standing.keys()):
            alive = {i: r for i, r in self._alive.items() if r not in standing} | alive
        self._seen, self._alive = seen, alive
        self._served = {i: served for i, served in self._served.items() if i in alive}
        # A message may have overtaken the answer.
        self._applied = {incarnation: before.get(incarnation, (0, 0)) for incarnation in alive}
        for lease in leases:
            applied = max(self._applied[lease.incarnation], lease.catalog)
            self._applied[lease.incarnation] = applied
        self._failed = {replica_id: failed for replica_id, (_, failed) in standing.items()}

    def _has_lost(self, seen: tuple[str, int], alive: Set[str]) -> bool:
        """True for one lease after Redis has lost leases: this replica's own is missing, or Redis
        has another state than one that followed the last one.
        """
        epoch, sequence = self._seen or seen
        if self._replica_id not in alive or seen[0] != epoch or seen[1] < sequence:
            self._lost_until_s = self._now_s() + self._lease_s
        if self._lost_until_s is not None and self._now_s() >= self._lost_until_s:
            self._lost_until_s = None
        return self._lost_until_s is not None

    def _heard(self, message: dict[str, Any]) -> bool:
        incarnation = message["incarnation"]
        generation, sequence = message["catalog"]
        if incarnation in self._applied:
            applied = max(self._applied[incarnation], (generation, sequence))
            self._applied[incarnation] = applied
        else:
            self._looked_s = None
        # It may be of a version that has failed before, and may be added again.
        self._served[incarnation] = (0, 0) if message["failed"] else (generation, sequence)
        self._news.set()
        self._news = asyncio.Event()
        return True


def _loop_s() -> float:
    return asyncio.get_running_loop().time()


async def _came(news: asyncio.Event, timeout_s: float) -> bool:
    """False after `timeout_s` without news."""
    try:
        async with asyncio.timeout(timeout_s):
            await news.wait()
    except TimeoutError:
        return False
    return True
