"""The requests that engines ended under, as the whole fleet knows them.

lf2:{fleet}:deaths:{digest}  set of the engines' ends under the request, TTL
lf2:{fleet}:suspects         sorted set: digest → Unix time until which it is suspected
"""

import asyncio
import contextlib

from redis.asyncio import Redis

from cluster.errors import CatalogUnavailable
from cluster.redis_client import call, prefix
from replica.api.attempts import DEATHS_MAX, KEPT_S, LocalSuspects

_POLL_S = 1.0

# KEYS: suspects, deaths. ARGV: digest, death, seconds that a death counts.
_DIED = """
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[1], redis.call('TIME')[1] + ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return redis.call('SCARD', KEYS[2])
"""
# KEYS: suspects, deaths. ARGV: digest.
_CLEARED = """
redis.call('ZREM', KEYS[1], ARGV[1])
return redis.call('DEL', KEYS[2])
"""
# KEYS: suspects. ARGV: the key of a digest's deaths without the digest.
_READ = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', redis.call('TIME')[1])
local found = {}
for _, digest in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  found[#found + 1] = digest
  found[#found + 1] = redis.call('SCARD', ARGV[1] .. digest)
end
return found
"""


class SharedSuspects:
    """`interfaces.Suspects` of a fleet. Without Redis, each replica counts for itself.

    Belongs to one event loop. redis: closed by `run`.
    """

    def __init__(self, redis: Redis, fleet: str) -> None:
        self._redis = redis
        self._suspects, self._deaths = (f"{prefix(fleet)}{key}" for key in ("suspects", "deaths:"))
        self._died = redis.register_script(_DIED)
        self._cleared = redis.register_script(_CLEARED)
        self._read = redis.register_script(_READ)
        self._own = LocalSuspects()
        self._counts: dict[str, int] = {}

    @property
    def any(self) -> bool:
        return bool(self._counts) or self._own.any

    def poisoned(self, digest: str) -> bool:
        return self._counts.get(digest, 0) >= DEATHS_MAX or self._own.poisoned(digest)

    async def died(self, digest: str, death: str) -> int:
        own = await self._own.died(digest, death)
        keys = [self._suspects, self._deaths + digest]
        try:
            return max(own, int(await call(self._died(keys, [digest, death, int(KEPT_S)]))))
        except CatalogUnavailable:
            return own

    async def cleared(self, digest: str) -> None:
        if digest not in self._counts and not self._own.suspected(digest):
            return
        self._counts.pop(digest, None)
        await self._own.cleared(digest)
        with contextlib.suppress(CatalogUnavailable):
            await call(self._cleared([self._suspects, self._deaths + digest], [digest]))

    async def run(self) -> None:
        """Follows what other replicas have found, until cancelled."""
        try:
            while True:
                with contextlib.suppress(CatalogUnavailable):
                    found = await call(self._read([self._suspects], [self._deaths]))
                    self._counts = dict(zip(found[::2], map(int, found[1::2]), strict=True))
                await asyncio.sleep(_POLL_S)
        finally:
            await self._redis.aclose()
