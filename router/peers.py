"""Counts the routers that pick for this fleet, since each sees only its own picks.

    lf2:{fleet}:routers  sorted set: router → Unix time of its last word

A router gives word while it picks. So the routers of Serve's fallback proxies, which are asked only
in need, do not count.
"""

import asyncio
import contextlib
import secrets
import time

from redis.asyncio import Redis

from cluster.errors import CatalogUnavailable
from cluster.redis_client import call, prefix

_WORD_S = 1.0
_LIFE_S = 5.0

# KEYS: routers. ARGV: this router or '', seconds that a word counts.
_COUNT = """
local now = redis.call('TIME')[1]
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""


class Peers:
    """count: routers that pick, this one included. Stays what it was while Redis is away.

    redis: closed by `run`.
    """

    def __init__(self, redis: Redis, fleet: str) -> None:
        self._redis = redis
        self._id = secrets.token_hex(8)
        self._keys = [f"{prefix(fleet)}routers"]
        self._script = redis.register_script(_COUNT)
        self._picked_s = -float("inf")
        self.count = 1

    def picked(self, now_s: float) -> None:
        self._picked_s = now_s

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                picking = time.monotonic() < self._picked_s + _LIFE_S
                args: list[str | int] = [self._id if picking else "", int(_LIFE_S)]
                with contextlib.suppress(CatalogUnavailable):
                    self.count = max(1, int(await call(self._script(keys=self._keys, args=args))))
                await asyncio.sleep(_WORD_S)
        finally:
            await self._redis.aclose()
