"""Publishes a replica's adapter states, lease and load reports to the registry."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

from redis.asyncio import Redis

from cluster.catalog import keys as catalog_keys
from cluster.errors import CatalogUnavailable
from cluster.recovery import Stamp
from cluster.redis_client import RECONNECT_FIRST_S, RECONNECT_MAX_S, call, heed_cancellation, prefix
from cluster.registry import (
    Lease,
    acknowledgements,
    channel,
    encode_acknowledgement,
    encode_lease,
    encode_residency,
)
from cluster.values import AdapterState, LoadReport, Tier

log = logging.getLogger(__name__)

# KEYS: state, incarnations, the catalog's state, the catalog, lease, residency, mark.
# ARGV: a fresh id, channel, incarnation, lease, lease_ms, 'whole' or 'change', number of entries
# that the hash must have before a change, entries to set (JSON object), digests to drop (JSON
# array), channel of acknowledgements or '', the id of the call before, the acknowledgement, then
# digest, entry, digest, entry ...
# The id becomes the epoch if there is none, and this replica's mark: a Redis that went back to an
# older state has an older mark, however many entries that state has.
_ANNOUNCE = """
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1])
local epoch = redis.call('HGET', KEYS[1], 'epoch')
local head = redis.call('HMGET', KEYS[3], 'generation', 'sequence', 'count', 'settling')
local settled = head[1] and not head[4] and tonumber(head[3]) == redis.call('HLEN', KEYS[4])
local catalog = {head[1] or '0', head[2] or '0', settled and '1' or ''}
local whole = ARGV[6] == 'whole'
local listed = redis.call('SADD', KEYS[2], ARGV[3]) == 0
if whole then
  redis.call('DEL', KEYS[6])
elseif not listed or redis.call('EXISTS', KEYS[5]) == 0
    or redis.call('GET', KEYS[7]) ~= ARGV[11]
    or redis.call('HLEN', KEYS[6]) ~= tonumber(ARGV[7]) then
  return {'lost', unpack(catalog)}
end
local changed = whole
for _, digest in ipairs(cjson.decode(ARGV[9])) do
  redis.call('HDEL', KEYS[6], digest)
  changed = true
end
for i = 13, #ARGV, 2 do
  redis.call('HSET', KEYS[6], ARGV[i], ARGV[i + 1])
  changed = true
end
if changed then redis.call('HINCRBY', KEYS[1], 'sequence', 1) end
redis.call('SET', KEYS[5], ARGV[4], 'PX', ARGV[5])
redis.call('SET', KEYS[7], ARGV[1], 'PX', ARGV[5])
redis.call('PEXPIRE', KEYS[6], ARGV[5])
local kind = whole and 'whole' or (changed and 'change' or 'report')
redis.call('PUBLISH', ARGV[2], '{"epoch":"' .. epoch .. '","sequence":'
  .. (redis.call('HGET', KEYS[1], 'sequence') or '0') .. ',"kind":"' .. kind
  .. '","lease":' .. ARGV[4] .. ',"set":' .. ARGV[8] .. ',"drop":' .. ARGV[9] .. '}')
if ARGV[10] ~= '' then redis.call('PUBLISH', ARGV[10], ARGV[12]) end
return {'ok', unpack(catalog)}
"""

# KEYS as above. ARGV as above, up to incarnation.
_WITHDRAW = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then return end
redis.call('DEL', KEYS[5], KEYS[6], KEYS[7])
redis.call('SREM', KEYS[2], ARGV[3])
local sequence = redis.call('HINCRBY', KEYS[1], 'sequence', 1)
redis.call('PUBLISH', ARGV[2], '{"epoch":"' .. epoch .. '","sequence":'
  .. sequence .. ',"kind":"gone","incarnation":'
  .. cjson.encode(ARGV[3]) .. '}')
"""


class Publisher:
    """Publishes one replica: adapter states when they change, the lease with every report.

    Call it on the event loop of `run`. A report costs what has changed, not what is held: `changed`
    says what has. `residency` is read when Redis has nothing of this replica yet, or lost it.

    residency, report: read the engine. applied: the state of the catalog applied here.
    alive: False withdraws the replica and ends `run`.
    on_catalog: called at each renewal with the catalog's state in Redis, and whether it is settled,
    as far as this shows without asking which server it is.
    """

    def __init__(
        self,
        redis: Redis,
        fleet: str,
        replica_id: str,
        *,
        lease_s: float,
        report_s: float,
        residency: Callable[[], Iterable[AdapterState]],
        report: Callable[[], LoadReport],
        applied: Callable[[], Stamp] = lambda: (0, 0),
        alive: Callable[[], bool] = lambda: True,
        on_catalog: Callable[[Stamp, bool], None] = lambda stamp, settled: None,
        url: Callable[[], str] = lambda: "",
        files_key: str = "",
    ) -> None:
        self.replica_id = replica_id
        self.incarnation = f"{replica_id}:{secrets.token_hex(4)}"
        self._started_s = time.time()
        self._lease_s, self._report_s = lease_s, report_s
        self._residency, self._report = residency, report
        self._applied, self._alive, self._on_catalog = applied, alive, on_catalog
        self._url, self._files_key = url, files_key
        self._channel = channel(redis, fleet)
        root = prefix(fleet)
        self._keys = [
            root + "residency:state",
            root + "incarnations",
            *catalog_keys(fleet),
            f"{root}lease:{self.incarnation}",
            f"{root}residency:{self.incarnation}",
            f"{root}mark:{self.incarnation}",
        ]
        self._announce = redis.register_script(_ANNOUNCE)
        self._withdraw = redis.register_script(_WITHDRAW)
        self._acknowledgements = acknowledgements(redis, fleet)
        self._published: dict[str, AdapterState] | None = None
        self._changed: dict[str, AdapterState] = {}
        self._failed: set[str] = set()  # digests that this replica cannot serve
        self._acknowledged: Stamp = (0, 0)  # the last state of the catalog published as applied
        self._mark = ""  # the id of the last call that Redis took
        self._wake = asyncio.Event()

    @property
    def published(self) -> Mapping[str, AdapterState]:
        """What Redis has of this replica; empty before the first report and while Redis is away."""
        return self._published or {}

    def changed(self, entries: Iterable[AdapterState]) -> None:
        """The next report tells these states. ABSENT: the replica no longer has it."""
        for entry in entries:
            self._changed[entry.digest] = entry
            if entry.tier is Tier.FAILED:
                self._failed.add(entry.digest)
            else:
                self._failed.discard(entry.digest)

    def fails(self, digest: str) -> bool:
        """True if this replica cannot serve the version."""
        return digest in self._failed

    def wake(self) -> None:
        """Publishes now instead of at the next report."""
        self._wake.set()

    async def run(self) -> None:
        """Returns once the engine is dead. Redis may come and go."""
        delay_s = RECONNECT_FIRST_S
        while self._alive():
            heed_cancellation()
            self._wake.clear()
            try:
                await self.publish()
                delay_s, wait_s = RECONNECT_FIRST_S, self._report_s
            except CatalogUnavailable:
                self._published = None  # nobody knows what Redis has taken of it
                delay_s = wait_s = min(delay_s * 2, RECONNECT_MAX_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
        await self.close()

    async def publish(self) -> None:
        """Publishes what changed since the last call, or everything if Redis lost this replica."""
        entries, self._changed = self._changed, {}
        held = self._published
        if held is not None:
            changed, dropped = _difference(held, entries)
            if await self._send("change", changed, dropped, len(held)):
                held.update((entry.digest, entry) for entry in changed)
                for digest in dropped:
                    del held[digest]
                return
            log.warning("%s: Redis lost this replica's state", self.incarnation)
        held = {r.digest: r for r in self._residency() if r.tier is not Tier.ABSENT}
        self._failed = {digest for digest, entry in held.items() if entry.tier is Tier.FAILED}
        await self._send("whole", list(held.values()), [], 0)
        self._published = held

    async def close(self) -> None:
        """Withdraws lease and adapter states. Without Redis they expire by themselves."""
        try:
            await call(self._withdraw(keys=self._keys, args=["", self._channel, self.incarnation]))
        except CatalogUnavailable:
            log.warning("%s: cannot withdraw; its lease will expire", self.incarnation)

    async def _send(
        self, kind: str, changed: list[AdapterState], dropped: list[str], count: int
    ) -> bool:
        applied = self._applied()
        lease = Lease(
            self.replica_id,
            self.incarnation,
            self._started_s,
            self._lease_s,
            applied,
            self._report(),
            url=self._url(),
            files_key=self._files_key,
        )
        pairs: list[str] = []
        for entry in changed:
            pairs += [entry.digest, encode_residency(entry)]
        entries = ",".join(f'"{d}":{r}' for d, r in zip(pairs[::2], pairs[1::2], strict=True))
        mark = secrets.token_hex(8)
        head = [mark, self._channel, self.incarnation]
        terms = [encode_lease(lease), str(int(self._lease_s * 1000)), kind]
        # With its first report, so that those who wait for a change hear of a replica that starts.
        tells = kind == "whole" or applied != self._acknowledged
        told = self._acknowledgements if tells else ""
        change = [str(count), "{" + entries + "}", json.dumps(dropped), told, self._mark]
        change.append(encode_acknowledgement(self.incarnation, applied, bool(self._failed)))
        outcome, generation, sequence, settled = await call(
            self._announce(keys=self._keys, args=head + terms + change + pairs)
        )
        self._on_catalog((int(generation), int(sequence)), bool(settled))
        if outcome == "ok":
            self._acknowledged, self._mark = applied, mark
        return bool(outcome == "ok")


def _difference(
    held: Mapping[str, AdapterState], entries: Mapping[str, AdapterState]
) -> tuple[list[AdapterState], list[str]]:
    """What to set and what to drop, so that `held` follows `entries`."""
    changed, dropped = [], []
    for digest, entry in entries.items():
        if entry.tier is not Tier.ABSENT:
            if held.get(digest) != entry:
                changed.append(entry)
        elif digest in held:
            dropped.append(digest)
    return changed, dropped
