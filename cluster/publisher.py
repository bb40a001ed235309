"""Publishes a replica's adapter states, lease and load reports to the registry."""

import asyncio
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

from redis.asyncio import Redis

from cluster.errors import CatalogUnavailable
from cluster.redis_client import RECONNECT_FIRST_S, RECONNECT_MAX_S, call, heed_cancellation, prefix
from cluster.registry import Lease, channel, encode_residency
from cluster.values import AdapterState, LoadReport, Tier

log = logging.getLogger(__name__)

# KEYS: epoch, sequence, incarnations, catalog sequence, lease, residency.
# ARGV: a fresh epoch, channel, incarnation, lease, lease_ms, 'whole' or 'change', number of entries
# that the hash must have before a change, entries to set (JSON object), digests to drop (JSON
# array), then digest, entry, digest, entry ...
_ANNOUNCE = """
local epoch = redis.call('GET', KEYS[1])
if not epoch then
  epoch = ARGV[1]
  redis.call('SET', KEYS[1], epoch)
end
local catalog = redis.call('GET', KEYS[4]) or '0'
local whole = ARGV[6] == 'whole'
if whole then
  redis.call('DEL', KEYS[6])
  redis.call('SADD', KEYS[3], ARGV[3])
elseif redis.call('EXISTS', KEYS[5]) == 0 or redis.call('HLEN', KEYS[6]) ~= tonumber(ARGV[7]) then
  return {'lost', catalog}
end
local changed = whole
for _, digest in ipairs(cjson.decode(ARGV[9])) do
  redis.call('HDEL', KEYS[6], digest)
  changed = true
end
for i = 10, #ARGV, 2 do
  redis.call('HSET', KEYS[6], ARGV[i], ARGV[i + 1])
  changed = true
end
if changed then redis.call('INCR', KEYS[2]) end
redis.call('SET', KEYS[5], ARGV[4], 'PX', ARGV[5])
redis.call('PEXPIRE', KEYS[6], ARGV[5])
local kind = whole and 'whole' or (changed and 'change' or 'report')
redis.call('PUBLISH', ARGV[2], '{"epoch":"' .. epoch .. '","sequence":'
  .. (redis.call('GET', KEYS[2]) or '0') .. ',"kind":"' .. kind .. '","lease":' .. ARGV[4]
  .. ',"set":' .. ARGV[8] .. ',"drop":' .. ARGV[9] .. '}')
return {'ok', catalog}
"""

# KEYS as above. ARGV as above, up to incarnation.
_WITHDRAW = """
local epoch = redis.call('GET', KEYS[1])
if not epoch then return end
redis.call('DEL', KEYS[5], KEYS[6])
redis.call('SREM', KEYS[3], ARGV[3])
redis.call('INCR', KEYS[2])
redis.call('PUBLISH', ARGV[2], '{"epoch":"' .. epoch .. '","sequence":'
  .. redis.call('GET', KEYS[2]) .. ',"kind":"gone","incarnation":'
  .. cjson.encode(ARGV[3]) .. '}')
"""


class Publisher:
    """Publishes one replica: adapter states when they change, the lease with every report.

    Call it on the event loop of `run`. It compares `residency` with what it published last, so a
    lost call of `wake` only delays a change by report_s.

    residency, report: read the engine. applied: the catalog sequence applied here.
    alive: False withdraws the replica and ends `run`.
    on_catalog: called at each renewal with the catalog sequence in Redis.
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
        applied: Callable[[], int] = lambda: 0,
        alive: Callable[[], bool] = lambda: True,
        on_catalog: Callable[[int], None] = lambda sequence: None,
    ) -> None:
        self.replica_id = replica_id
        self.incarnation = f"{replica_id}:{secrets.token_hex(4)}"
        self._started_s = time.time()
        self._lease_s, self._report_s = lease_s, report_s
        self._residency, self._report = residency, report
        self._applied, self._alive, self._on_catalog = applied, alive, on_catalog
        self._channel = channel(fleet)
        root = prefix(fleet)
        self._keys = [
            root + key
            for key in (
                "epoch",
                "residency:sequence",
                "incarnations",
                "catalog:sequence",
                f"lease:{self.incarnation}",
                f"residency:{self.incarnation}",
            )
        ]
        self._announce = redis.register_script(_ANNOUNCE)
        self._withdraw = redis.register_script(_WITHDRAW)
        self._published: dict[str, AdapterState] | None = None
        self._wake = asyncio.Event()

    @property
    def published(self) -> Mapping[str, AdapterState]:
        """What Redis has of this replica; empty before the first report and while Redis is away."""
        return self._published or {}

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
                self._published = None
                delay_s = wait_s = min(delay_s * 2, RECONNECT_MAX_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
        await self.close()

    async def publish(self) -> None:
        """Publishes what changed since the last call, or everything if Redis lost this replica."""
        held = {r.digest: r for r in self._residency() if r.tier is not Tier.ABSENT}
        before = self._published
        if before is not None:
            changed = [r for d, r in held.items() if before.get(d) != r]
            dropped = [digest for digest in before if digest not in held]
            if await self._send("change", changed, dropped, len(before)):
                self._published = held
                return
            log.warning("%s: Redis lost this replica's state", self.incarnation)
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
        lease = Lease(
            self.replica_id,
            self.incarnation,
            self._started_s,
            self._lease_s,
            self._applied(),
            self._report(),
        )
        pairs: list[str] = []
        for entry in changed:
            pairs += [entry.digest, encode_residency(entry)]
        entries = ",".join(f'"{d}":{r}' for d, r in zip(pairs[::2], pairs[1::2], strict=True))
        head = [secrets.token_hex(8), self._channel, self.incarnation]
        terms = [json.dumps(dataclasses.asdict(lease)), str(int(self._lease_s * 1000)), kind]
        change = [str(count), "{" + entries + "}", json.dumps(dropped)]
        outcome, catalog = await call(
            self._announce(keys=self._keys, args=head + terms + change + pairs)
        )
        self._on_catalog(int(catalog))
        return bool(outcome == "ok")
