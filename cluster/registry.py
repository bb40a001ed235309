"""Adapter states, leases and load reports of all replicas in Redis, and how to read them.

    lf2:{fleet}:residency:{incarnation}  hash: digest → {tier, bytes, since, reason} (JSON), TTL
    lf2:{fleet}:lease:{incarnation}      lease with the replica's load report (JSON), TTL
    lf2:{fleet}:mark:{incarnation}       random id of the replica's last report, TTL
    lf2:{fleet}:incarnations             set of the incarnations that may be alive
    lf2:{fleet}:residency:state          hash: epoch, a random id, new when Redis has none;
                                         sequence, the number of changes so far
    lf2:{fleet}:residency:changes@N      channel for database N: {epoch, sequence, kind,
                                         incarnation, ...}
    lf2:{fleet}:acknowledgements@N       channel: {incarnation, catalog, failed} of a replica that
                                         starts or has applied changes of the catalog; failed: true
                                         if there are versions that it cannot serve

incarnation = replica_id:start_nonce. Lease and residency have the same TTL, so a killed replica
disappears from Redis after lease_s. `publisher.py` writes these keys. The snapshot script computes
key names, so it needs a single or replicated Redis; Redis Cluster does not work.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from redis.asyncio import Redis

from cluster.catalog import Catalog
from cluster.recovery import Stamp
from cluster.redis_client import SCHEMA, Subscription, call, channel_name, connect, prefix
from cluster.values import AdapterState, LoadReport, Tier
from cluster.versions import Book

log = logging.getLogger(__name__)

# KEYS: state, incarnations. ARGV: the prefix.
_SNAPSHOT = """
local live = {}
for _, incarnation in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local key = ARGV[1] .. 'lease:' .. incarnation
  local lease = redis.call('GET', key)
  if lease then
    local held = redis.call('HGETALL', ARGV[1] .. 'residency:' .. incarnation)
    live[#live + 1] = {lease, redis.call('PTTL', key), held}
  else
    redis.call('SREM', KEYS[2], incarnation)
  end
end
return {redis.call('HGET', KEYS[1], 'epoch') or '', redis.call('HGET', KEYS[1], 'sequence') or '0',
  live}
"""


# KEYS as above. ARGV: the prefix, what is in an entry of a version that failed, then digests.
# Returns epoch, sequence, [[lease, [digest, entry, …] of those that failed there]].
_STANDING = """
local live = {}
for _, incarnation in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local lease = redis.call('GET', ARGV[1] .. 'lease:' .. incarnation)
  if lease then
    local held = {}
    for i = 3, #ARGV do
      local entry = redis.call('HGET', ARGV[1] .. 'residency:' .. incarnation, ARGV[i])
      if entry and string.find(entry, ARGV[2], 1, true) then
        held[#held + 1] = ARGV[i]
        held[#held + 1] = entry
      end
    end
    live[#live + 1] = {lease, held}
  end
end
return {redis.call('HGET', KEYS[1], 'epoch') or '', redis.call('HGET', KEYS[1], 'sequence') or '0',
  live}
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a replica publishes with each renewal.

    started_s: Unix time. Of two incarnations of one replica the later one counts.
    catalog: the state of the catalog, (generation, sequence), that the replica has applied.
    url: where other replicas reach its server; "" if it is not known.
    files_key: what it gives adapter files for: nobody reads it but who may read Redis.
    """

    replica_id: str
    incarnation: str
    started_s: float
    lease_s: float
    catalog: Stamp
    report: LoadReport
    schema: int = SCHEMA
    url: str = ""
    files_key: str = dataclasses.field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One live replica as a reader sees it. seen_s: time of its last report, on the reader's
    monotonic clock.
    """

    replica_id: str
    incarnation: str
    residency: Mapping[str, AdapterState]
    report: LoadReport
    seen_s: float
    catalog: Stamp = (0, 0)


def channel(redis: Redis, fleet: str) -> str:
    return channel_name(redis, prefix(fleet) + "residency:changes")


def acknowledgements(redis: Redis, fleet: str) -> str:
    """Its channel."""
    return channel_name(redis, prefix(fleet) + "acknowledgements")


def encode_acknowledgement(incarnation: str, catalog: Stamp, failed: bool) -> str:
    return json.dumps({"incarnation": incarnation, "catalog": catalog, "failed": failed})


def encode_residency(entry: AdapterState) -> str:
    record = {"tier": entry.tier.value, "bytes": entry.bytes, "since": entry.since_s}
    return json.dumps(record | {"reason": entry.reason}, separators=(",", ":"))


_FAILED = f'"tier":"{Tier.FAILED.value}"'
"""In what `encode_residency` makes of one that failed. In a reason, quotes have a backslash."""


def _decode_residency(digest: str, record: Mapping[str, Any]) -> AdapterState:
    return AdapterState(
        digest, Tier(record["tier"]), record["bytes"], record["since"], record.get("reason")
    )


_REPORT_FIELDS = frozenset(field.name for field in dataclasses.fields(LoadReport))
_LEASE_FIELDS = tuple(field.name for field in dataclasses.fields(Lease))


def encode_lease(lease: Lease) -> str:
    # Each report is encoded: `dataclasses.asdict`, which copies, takes three times as long.
    record = {name: getattr(lease, name) for name in _LEASE_FIELDS}
    record["report"] = {name: getattr(lease.report, name) for name in _REPORT_FIELDS}
    return json.dumps(record)


def _decode_lease(record: Mapping[str, Any]) -> Lease:
    report = {k: v for k, v in record["report"].items() if k in _REPORT_FIELDS}
    return Lease(
        replica_id=record["replica_id"],
        incarnation=record["incarnation"],
        started_s=record["started_s"],
        lease_s=record["lease_s"],
        catalog=(record["catalog"][0], record["catalog"][1]),
        report=LoadReport(**report),
        schema=record.get("schema", 0),
        url=record.get("url", ""),
        files_key=record.get("files_key", ""),
    )


# A replica's lease, and of digests that it cannot read: digest → why.
Standing = tuple[Lease, dict[str, str]]


class Registry:
    """Reads what all replicas published, in one atomic script."""

    def __init__(self, redis: Redis, fleet: str) -> None:
        self._root = prefix(fleet)
        self._keys = [self._root + key for key in ("residency:state", "incarnations")]
        self._snapshot = redis.register_script(_SNAPSHOT)
        self._standing = redis.register_script(_STANDING)

    async def read(
        self,
    ) -> tuple[str, int, list[tuple[Lease, float, dict[str, AdapterState]]]]:
        """(epoch, sequence, [(lease, seconds until it expires, residency)])."""
        epoch, sequence, live = await call(self._snapshot(keys=self._keys, args=[self._root]))
        found = []
        for lease, ttl_ms, held in live:
            try:
                known = _decode_lease(json.loads(lease))
                entries = {
                    digest: _decode_residency(digest, json.loads(record))
                    for digest, record in zip(held[::2], held[1::2], strict=True)
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("ignoring a replica's record, which cannot be read (%s)", error)
                continue
            found.append((known, max(ttl_ms, 0) / 1000, entries))
        return epoch, int(sequence), found

    async def standing(
        self, digests: Sequence[str] = ()
    ) -> tuple[tuple[str, int], dict[str, Standing]]:
        """((epoch, sequence), by replica id the standing of its newest incarnation)."""
        found: dict[str, Standing] = {}
        args = [self._root, _FAILED, *digests]
        epoch, sequence, live = await call(self._standing(keys=self._keys, args=args))
        for text, held in live:
            try:
                lease = _decode_lease(json.loads(text))
                entries = {
                    digest: _decode_residency(digest, json.loads(record))
                    for digest, record in zip(held[::2], held[1::2], strict=True)
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("ignoring a replica's record, which cannot be read (%s)", error)
                continue
            before = found.get(lease.replica_id)
            if before is None or newest([before[0], lease]) == [lease]:
                failed = {digest: entry.reason or "" for digest, entry in entries.items()}
                found[lease.replica_id] = lease, failed
        return (epoch, int(sequence)), found


def newest(leases: Iterable[Lease]) -> list[Lease]:
    """The lease of each replica's last incarnation, sorted by replica_id."""
    best: dict[str, Lease] = {}
    for lease in sorted(leases, key=lambda lease: (lease.started_s, lease.incarnation)):
        best[lease.replica_id] = lease
    return [best[replica_id] for replica_id in sorted(best)]


@dataclass(slots=True)
class _Seen:
    lease: Lease
    residency: dict[str, AdapterState]
    seen_s: float
    deadline_s: float
    graced: bool = False


class FleetView:
    """One process's view of the fleet, updated by subscription. Reading it never raises.

    Call it on the event loop of `run`. While Redis is away, no lease expires here. When Redis is
    back, each replica has one lease time to report again.

    silence_s: after this time without a message Redis is pinged; after twice this time it counts as
    away. Twice silence_s must be less than the lease time.
    """

    def __init__(
        self,
        redis_url: str,
        fleet: str,
        *,
        base_name: str = "",
        silence_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = connect(redis_url)
        self._clock = clock
        self._catalog = Catalog(self._redis, fleet, base_name)
        self._registry = Registry(self._redis, fleet)
        self._subscription = Subscription(
            self._redis,
            channel(self._redis, fleet),
            apply=self._apply,
            resync=self._resync,
            silence_s=silence_s,
        )
        self._epoch, self._sequence = "", 0
        self._seen: dict[str, _Seen] = {}
        self._replicas: dict[str, ReplicaState] | None = None
        self._next_expiry_s = float("inf")
        self.resyncs = 0

    @property
    def connected(self) -> bool:
        return self._subscription.connected and self._catalog.connected

    @property
    def book(self) -> Book:
        """This process's copy of the catalog."""
        return self._catalog.book

    def digest_of(self, name: str) -> str | None:
        """None for the base model and for an unknown name."""
        version = self._catalog.book.get(name)
        return version.digest if version is not None else None

    @property
    def replicas(self) -> Mapping[str, ReplicaState]:
        """Live replicas by replica_id."""
        if self._subscription.connected and self._clock() >= self._next_expiry_s:
            self._expire()
        if self._replicas is None:
            self._replicas = self._build()
        return self._replicas

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._catalog.run())
                tasks.create_task(self._subscription.run())
        finally:
            await self._redis.aclose()

    async def _resync(self) -> None:
        epoch, sequence, live = await self._registry.read()
        now = self._clock()
        seen = {
            lease.incarnation: _Seen(lease, held, now, now + left_s) for lease, left_s, held in live
        }
        if not self._subscription.connected:
            # Redis may be back before the replicas: each has one lease time to report again.
            for incarnation, old in self._seen.items():
                if incarnation not in seen:
                    if not old.graced:  # once: a flapping connection must not keep a dead replica
                        old.deadline_s, old.graced = now + old.lease.lease_s, True
                    seen[incarnation] = old
        self._epoch, self._sequence, self._seen = epoch, sequence, seen
        self.resyncs += 1
        self._changed()

    def _apply(self, message: dict[str, Any]) -> bool:
        sequence, kind = message["sequence"], message["kind"]
        if message["epoch"] != self._epoch:
            return False
        if sequence < self._sequence or (sequence == self._sequence and kind != "report"):
            return True
        if sequence != self._sequence + (kind != "report"):
            return False
        if kind == "gone":
            self._seen.pop(message["incarnation"], None)
        elif not self._heard(kind, message):
            return False
        self._sequence = sequence
        self._changed()
        return True

    def _heard(self, kind: str, message: dict[str, Any]) -> bool:
        lease = _decode_lease(message["lease"])
        known = self._seen.get(lease.incarnation)
        if known is None and kind != "whole":
            return False
        held = {} if known is None or kind == "whole" else known.residency
        for digest in message["drop"]:
            held.pop(digest, None)
        for digest, record in message["set"].items():
            held[digest] = _decode_residency(digest, record)
        now = self._clock()
        self._seen[lease.incarnation] = _Seen(lease, held, now, now + lease.lease_s)
        return True

    def _expire(self) -> None:
        now = self._clock()
        self._seen = {i: seen for i, seen in self._seen.items() if seen.deadline_s > now}
        self._changed()

    def _changed(self) -> None:
        self._replicas = None
        deadlines = (seen.deadline_s for seen in self._seen.values())
        self._next_expiry_s = min(deadlines, default=float("inf"))

    def _build(self) -> dict[str, ReplicaState]:
        states = {}
        for lease in newest(seen.lease for seen in self._seen.values()):
            seen = self._seen[lease.incarnation]
            states[lease.replica_id] = ReplicaState(
                lease.replica_id,
                lease.incarnation,
                MappingProxyType(seen.residency),
                lease.report,
                seen.seen_s,
                lease.catalog,
            )
        return states
