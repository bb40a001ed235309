"""The book of names → versions in Redis. Every process keeps a copy up to date.

lf2:{fleet}:catalog            hash: name → {stamp, run, version | null}, one record a name (JSON)
lf2:{fleet}:catalog:state      hash: generation, sequence, count (`recovery.Head` explains them),
                               settled_by, settling
lf2:{fleet}:catalog:changes@N  channel, for database N, which a channel does not know by itself:
                               {generation, sequence, records: {name: record}}, and `again` with
                               the digests of versions whose files may have been repaired

`recovery.py` says what happens when Redis comes back with less than it had.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from redis.asyncio import Redis

from cluster.catalog_scripts import (
    BEGIN,
    FORGET,
    FOUND,
    MERGE,
    PUT,
    REMOVE,
    RETRY,
    SETTLE,
    SNAPSHOT,
)
from cluster.errors import CatalogUnavailable
from cluster.recovery import (
    Head,
    Record,
    Records,
    Stamp,
    Step,
    decide,
    decode_record,
    encode_version,
)
from cluster.redis_client import (
    RECONNECT_MAX_S,
    Subscription,
    call,
    channel_name,
    connect_blocking,
    prefix,
)
from cluster.values import Version
from cluster.versions import Book, check_name, not_found, taken

log = logging.getLogger(__name__)

LOOKUP_BATCH_MAX = 256
WRITTEN_BACK_AT_ONCE = 512


class Unsettled(CatalogUnavailable):
    """Redis may have lost changes; the replicas are writing back what they know."""


def channel(redis: Redis, fleet: str) -> str:
    return channel_name(redis, prefix(fleet) + "catalog:changes")


def keys(fleet: str) -> list[str]:
    """State, catalog."""
    return [prefix(fleet) + "catalog:state", prefix(fleet) + "catalog"]


def found(url: str, fleet: str, *, configured: Iterable[str] | None = None) -> None:
    """Declares that no replica of the fleet is alive, so that nobody waits for one to speak.

    configured: names that the flags set. Those that earlier flags set, and these do not, go. None:
    all stay. Blocking. Raises what Redis raises.
    """
    args = [] if configured is None else ["configured", *configured]
    with connect_blocking(url) as client:
        client.register_script(FOUND)(keys=keys(fleet), args=args)


class Catalog:
    """One process's copy of the book. Changes go to Redis, and from there to all processes.

    Any thread may read `book`; call everything else on the event loop of `run`.
    lease_s: given by replicas. They write back what Redis has lost, for this time before changes go
    on. Without it the copy only follows, as a router's does.
    on_change: called after each change of the copy, with the digests whose versions may differ, and
    those whose files may have been repaired.
    """

    def __init__(
        self,
        redis: Redis,
        fleet: str,
        base_name: str,
        *,
        lease_s: float | None = None,
        on_change: Callable[[Set[str], Set[str]], None] = lambda digests, again: None,
    ) -> None:
        self.book = Book(base_name)
        self.stamp: Stamp = (0, 0)  # the latest state of Redis that this copy has followed
        self.settles_in_s: float | None = None  # from the last look on; None: it is settled
        self.synced = False
        self._records = Records()
        self._lease_ms = None if lease_s is None else int(lease_s * 1000)
        self._on_change = on_change
        self._channel = channel(redis, fleet)
        self._keys = keys(fleet)
        self._redis = redis
        scripts = (BEGIN, FORGET, MERGE, PUT, REMOVE, RETRY, SETTLE, SNAPSHOT)
        self._scripts = {script: redis.register_script(script) for script in scripts}
        self._unsettled = asyncio.Event()
        self._looks = asyncio.Lock()
        self._waiting: list[dict[str, Any]] | None = None  # messages, while Redis is asked
        self._subscription = Subscription(
            redis, self._channel, apply=self._apply, resync=self.resync
        )
        self._lookups: dict[str, asyncio.Future[Version | None]] = {}
        self._lookup_task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._subscription.connected

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._subscription.run())
            tasks.create_task(self._settle())

    async def resync(self) -> None:
        """Reads the whole catalog, and as a replica writes back what Redis lacks.

        Raises what Redis raises, or CatalogUnavailable.
        """
        async with self._looks:  # one at a time
            while await self._look():
                pass

    async def _look(self) -> bool:
        """True if there is more to see: a new generation, or messages with a gap."""
        # Messages that come while Redis answers wait: the answer may not have their changes yet,
        # and would look as if Redis had lost them.
        waiting: list[dict[str, Any]] = []
        self._waiting = waiting
        try:
            head, theirs = await self._read()
            step, left_ms = self._decided(head)
            forgotten = self._records.forget_removals()
            newer = self._records.newer_than(theirs)
            self._follow(head, theirs, step)
        finally:
            self._waiting = None
            missed = [message for message in waiting if not self._understood(message)]
        if self._lease_ms is None:
            return bool(missed)
        await self._recover(head, step, newer, forgotten)
        self._set_settling(None if step is Step.FOLLOW else left_ms / 1000)
        return step is Step.SETTLE or bool(missed)

    def _decided(self, head: Head) -> tuple[Step, int]:
        if self._lease_ms is None:
            return Step.FOLLOW if head.settled else Step.WAIT, 0
        return decide(head, self.stamp, self._lease_ms)

    def _follow(self, head: Head, theirs: Mapping[str, Record], step: Step) -> None:
        if step is not Step.FOLLOW:
            self._take(theirs, self.stamp)
        elif self._lease_ms is None:  # what it knows beyond that, no replica has written back
            self._changed(self._records.replace(theirs), head.stamp)
        else:
            self._take(theirs, head.stamp)
        self.synced = True

    async def _recover(
        self,
        head: Head,
        step: Step,
        newer: Mapping[str, Record],
        forgotten: Mapping[str, Record],
    ) -> None:
        """A replica's part in keeping what Redis may lose. forgotten: removals."""
        if step is Step.BEGIN:
            if self.stamp != (0, 0) or head.held:  # else it may well be new
                log.warning("Redis may have lost changes of the catalog: %s", head)
            await self._run(BEGIN, head.settling)
        if newer:
            log.warning("writing %d records of the catalog back to Redis", len(newer))
            await self._write_back(newer)
        if step is Step.SETTLE:
            args = (head.settling, self._lease_ms, *self.stamp)
            await self._run(SETTLE, *map(str, args))
        if step is Step.FOLLOW and forgotten:
            await self._run(FORGET, *_pairs(forgotten))

    async def read(self) -> tuple[int, list[Version]]:
        """(sequence, versions sorted by name), read from Redis now."""
        head, records = await self._read()
        versions = [record.version for record in records.values() if record.version is not None]
        return head.sequence, sorted(versions, key=lambda version: version.name)

    def runs(self) -> dict[str, str]:
        """Name → id of the last run whose flags set it, in this copy."""
        return self._records.runs()

    async def put(
        self, version: Version, *, load_inplace: bool = False, run: str = ""
    ) -> tuple[Stamp, bool]:
        """`put_all` of one version."""
        return await self.put_all([version], load_inplace=load_inplace, run=run)

    async def put_all(
        self, versions: Sequence[Version], *, load_inplace: bool = False, run: str = ""
    ) -> tuple[Stamp, bool]:
        """All names change in one step, or none. Returns the stamp of the state after it, and True
        if the book changed.

        A name that has the same content, pin and weight already is a success, so that a client may
        try again, or name another directory of the same files.
        run: id of the fleet's run whose flags name the versions; '' for a change by the API. A run
        replaces a name only once, so that a restarted replica keeps later changes by the API.
        Raises BadRequest naming `lora_name`, Unsettled or CatalogUnavailable.
        """
        pairs: list[str] = []
        for version in versions:
            check_name(version.name, self.book.base_name)
            pairs += [version.name, encode_version(version)]
        generation, outcome, detail = await self._change(PUT, str(int(load_inplace)), run, *pairs)
        if outcome == "taken":
            raise taken(detail)
        return (generation, int(detail)), outcome == "put"

    async def remove(self, name: str) -> tuple[Stamp, str]:
        """Returns the stamp of the state after it and the removed digest.

        Raises ModelNotFound, Unsettled or CatalogUnavailable.
        """
        generation, outcome, detail = await self._change(REMOVE, name)
        if outcome == "absent":
            raise not_found(name)
        version = decode_record(outcome).version
        assert version is not None
        return (generation, int(detail)), version.digest

    async def retry(self, digests: Iterable[str]) -> Stamp:
        """Tells the replicas that cannot serve these versions to try at once: their files may have
        been repaired. Returns the stamp of the state after it.

        Raises Unsettled or CatalogUnavailable.
        """
        generation, _, sequence = await self._change(RETRY, json.dumps(sorted(digests)))
        return generation, int(sequence)

    async def has(self, names: Iterable[str], stamp: Stamp) -> Stamp | None:
        """A state of Redis that has these names' changes up to `stamp`, or None if it has not."""
        head, records = await self._read()
        for name in names:
            if name not in records or records[name].stamp < stamp:
                return None
        return head.stamp if head.settled else None

    async def lookup(self, name: str) -> Version | None:
        """Asks Redis for a name that the copy lacks.

        One query runs at a time and carries all names that came since the last one. This bounds
        what a flood of unknown names costs Redis.
        """
        future = self._lookups.get(name)
        if future is None:
            future = self._lookups[name] = asyncio.get_running_loop().create_future()
        if self._lookup_task is None or self._lookup_task.done():
            self._lookup_task = asyncio.create_task(self._answer_lookups())
        return await asyncio.shield(future)

    async def _answer_lookups(self) -> None:
        while self._lookups:
            names = list(self._lookups)[:LOOKUP_BATCH_MAX]
            futures = [self._lookups.pop(name) for name in names]
            try:
                texts = await call(self._redis.hmget(self._keys[1], names))
            except CatalogUnavailable as error:
                for future in futures:
                    future.set_exception(error)
                    future.exception()  # marks it retrieved: the caller may be gone
                continue
            for name, future, text in zip(names, futures, texts, strict=True):
                record = _decode(name, text) if text else None
                future.set_result(record.version if record is not None else None)

    async def _settle(self) -> None:
        """Looks again when settling is due."""
        while True:
            await self._unsettled.wait()
            await asyncio.sleep(self.settles_in_s or 0.0)
            try:
                await self.resync()
            except CatalogUnavailable:
                await asyncio.sleep(RECONNECT_MAX_S)

    def _set_settling(self, left_s: float | None) -> None:
        self.settles_in_s = left_s
        if left_s is None:
            self._unsettled.clear()
        else:
            self._unsettled.set()

    async def _read(self) -> tuple[Head, dict[str, Record]]:
        *numbers, items = await self._run(SNAPSHOT)
        generation, sequence, count, settled_by, settling, server, held, now_ms = numbers
        head = Head(
            int(generation or 0),
            int(sequence or 0),
            int(count or 0),
            settled_by or "",
            settling or "",
            server,
            int(held),
            int(now_ms),
        )
        pairs = zip(items[::2], items[1::2], strict=True)
        records = ((name, _decode(name, text)) for name, text in pairs)
        return head, {name: record for name, record in records if record is not None}

    async def _write_back(self, records: Mapping[str, Record]) -> None:
        pairs = _pairs(records)
        for start in range(0, len(pairs), 2 * WRITTEN_BACK_AT_ONCE):
            await self._run(MERGE, *pairs[start : start + 2 * WRITTEN_BACK_AT_ONCE])

    async def _change(self, script: str, *args: str) -> tuple[int, str, str]:
        """Runs a change. If Redis does not have what this copy knows, it resyncs and tries again.

        Returns the generation and the script's answer.
        """
        for _ in range(2):
            generation, sequence = self.stamp
            outcome, detail = await self._run(script, str(generation), str(sequence), *args)
            if outcome != "unsettled":
                return generation, outcome, detail
            await self.resync()
        raise Unsettled(
            "the fleet's Redis may have lost changes; the replicas are writing them back",
            retry_after_s=max(self.settles_in_s or 0.0, 0.05),
        )

    async def _run(self, script: str, *args: str) -> Any:
        return await call(self._scripts[script](keys=self._keys, args=[self._channel, *args]))

    def _apply(self, message: dict[str, Any]) -> bool:
        if self._waiting is not None:
            self._waiting.append(message)
            return True
        generation, sequence = message["generation"], message["sequence"]
        if generation != self.stamp[0]:
            return bool(0 < generation < self.stamp[0])  # late, of a generation that has ended
        if sequence > self.stamp[1] + 1:
            return False
        records = {name: decode_record(text) for name, text in message["records"].items()}
        again = frozenset(map(str, message.get("again", ())))
        self._take(records, max(self.stamp, (generation, sequence)), again)
        return True

    def _understood(self, message: dict[str, Any]) -> bool:
        try:
            return self._apply(message)
        except (ValueError, KeyError, TypeError, AttributeError):
            return False

    def _take(
        self, records: Mapping[str, Record], stamp: Stamp, again: Set[str] = frozenset()
    ) -> None:
        self._changed(self._records.take(records), stamp, again)

    def _changed(
        self, changes: Mapping[str, Version | None], stamp: Stamp, again: Set[str] = frozenset()
    ) -> None:
        digests = self.book.change(changes, stamp[1])
        self.stamp = stamp
        self._on_change(digests, again)


def _pairs(records: Mapping[str, Record]) -> list[str]:
    return [part for name, record in records.items() for part in (name, record.text)]


def _decode(name: str, text: str) -> Record | None:
    try:
        return decode_record(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("catalog: ignoring the record of %r, which cannot be read", name)
        return None
