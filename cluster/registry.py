"""Adapter states, leases and load reports of all replicas in Redis, and how to read them.

    lf:{fleet}:residency:{incarnation}  hash: digest → {tier, bytes, since, reason} (JSON), TTL
    lf:{fleet}:lease:{incarnation}      lease with the replica's load report (JSON), TTL
    lf:{fleet}:incarnations             set of the incarnations that may be alive
    lf:{fleet}:residency:sequence       number of changes so far
    lf:{fleet}:residency:changes        channel: {epoch, sequence, kind, incarnation, ...}

incarnation = replica_id:start_nonce. Lease and residency have the same TTL, so a killed replica
disappears from Redis after lease_s. `publisher.py` writes these keys. The snapshot script computes
key names, so it needs a single or replicated Redis; Redis Cluster does not work.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from redis.asyncio import Redis

from cluster.catalog import Catalog
from cluster.redis_client import Subscription, call, connect, prefix
from cluster.values import AdapterState, LoadReport, Tier

log = logging.getLogger(__name__)

# KEYS: epoch, sequence, incarnations. ARGV: the prefix, 'residency' or '' to omit it.
_SNAPSHOT = """
local live = {}
for _, incarnation in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local key = ARGV[1] .. 'lease:' .. incarnation
  local lease = redis.call('GET', key)
  if lease then
    local held = {}
    if ARGV[2] == 'residency' then
      held = redis.call('HGETALL', ARGV[1] .. 'residency:' .. incarnation)
    end
    live[#live + 1] = {lease, redis.call('PTTL', key), held}
  else
    redis.call('SREM', KEYS[3], incarnation)
  end
end
return {redis.call('GET', KEYS[1]) or '', redis.call('GET', KEYS[2]) or '0', live}
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a replica publishes with each renewal.

    started_s: Unix time. Of two incarnations of one replica the later one counts.
    catalog_sequence: the last change of the catalog that the replica has applied.
    """

    replica_id: str
    incarnation: str
    started_s: float
    lease_s: float
    catalog_sequence: int
    report: LoadReport


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
    catalog_sequence: int = 0


def channel(fleet: str) -> str:
    return prefix(fleet) + "residency:changes"


def encode_residency(entry: AdapterState) -> str:
    record = {"tier": entry.tier.value, "bytes": entry.bytes, "since": entry.since_s}
    return json.dumps(record | {"reason": entry.reason}, separators=(",", ":"))


def _decode_residency(digest: str, record: Mapping[str, Any]) -> AdapterState:
    return AdapterState(
        digest, Tier(record["tier"]), record["bytes"], record["since"], record.get("reason")
    )


_REPORT_FIELDS = frozenset(field.name for field in dataclasses.fields(LoadReport))


def _decode_lease(record: Mapping[str, Any]) -> Lease:
    report = {k: v for k, v in record["report"].items() if k in _REPORT_FIELDS}
    return Lease(
        replica_id=record["replica_id"],
        incarnation=record["incarnation"],
        started_s=record["started_s"],
        lease_s=record["lease_s"],
        catalog_sequence=record["catalog_sequence"],
        report=LoadReport(**report),
    )


class Registry:
    """Reads what all replicas published, in one atomic script."""

    def __init__(self, redis: Redis, fleet: str) -> None:
        self._root = prefix(fleet)
        self._keys = [self._root + key for key in ("epoch", "residency:sequence", "incarnations")]
        self._snapshot = redis.register_script(_SNAPSHOT)

    async def read(
        self, *, residency: bool = True
    ) -> tuple[str, int, list[tuple[Lease, float, dict[str, AdapterState]]]]:
        """(epoch, sequence, [(lease, seconds until it expires, residency)])."""
        args = [self._root, "residency" if residency else ""]
        epoch, sequence, live = await call(self._snapshot(keys=self._keys, args=args))
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

    async def leases(self) -> list[Lease]:
        """The newest lease of each live replica, sorted by replica_id."""
        _, _, live = await self.read(residency=False)
        return newest([lease for lease, _, _ in live])


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
        self._catalog = Catalog(self._redis, fleet, base_name, on_change=self._renamed)
        self._registry = Registry(self._redis, fleet)
        self._subscription = Subscription(
            self._redis,
            channel(fleet),
            apply=self._apply,
            resync=self._resync,
            silence_s=silence_s,
        )
        self._epoch, self._sequence = "", 0
        self._seen: dict[str, _Seen] = {}
        self._names: dict[str, str | None] = {}
        self._replicas: dict[str, ReplicaState] | None = None
        self._next_expiry_s = float("inf")
        self.resyncs = 0

    @property
    def connected(self) -> bool:
        return self._subscription.connected and self._catalog.connected

    @property
    def names(self) -> Mapping[str, str | None]:
        """Adapter name → digest. The base model's name, if it was given, → None."""
        return MappingProxyType(self._names)

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

    def _renamed(self) -> None:
        book = self._catalog.book
        self._names = {version.name: version.digest for version in book.by_name()}
        if book.base_name:
            self._names[book.base_name] = None

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
        if kind != "report":
            dropped = message["drop"]
            held = {d: r for d, r in held.items() if d not in dropped}
            held |= {d: _decode_residency(d, record) for d, record in message["set"].items()}
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
                lease.catalog_sequence,
            )
        return states
