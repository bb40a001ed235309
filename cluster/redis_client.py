"""Connections to Redis: bounded waits, one key prefix, a subscription that reconnects itself."""

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.sentinel import Sentinel as SyncSentinel
from redis.sentinel import SentinelConnectionPool as SyncSentinelConnectionPool

from cluster.errors import CatalogUnavailable, ConfigError
from cluster.redis_address import risks, sentinel_address

log = logging.getLogger(__name__)

# Of the keys and what they hold. Raise it if an older process would misread them.
SCHEMA = 2
COMMAND_TIMEOUT_S = 1.0
CALL_TIMEOUT_S = 2.0
RECONNECT_FIRST_S = 0.05
RECONNECT_MAX_S = 1.0

# What redis-py raises if Redis is away, hung, loading its data or out of memory.
Unreachable = (RedisError, OSError, TimeoutError)


def connect(url: str) -> Redis:
    """A client that fails fast. The caller decides whether to retry.

    url: redis://, rediss:// (TLS), unix://, or redis+sentinel:// and rediss+sentinel:// as
    `sentinel_address` explains. Raises ValueError if it is none of these.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "socket_connect_timeout": COMMAND_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    found = sentinel_address(url)
    if found is None:
        return Redis.from_url(url, **options)
    of_sentinels = {**found.sentinel_options, **options}
    sentinel = Sentinel(found.sentinels, sentinel_kwargs=of_sentinels)  # type: ignore[no-untyped-call]
    master: Redis = sentinel.master_for(
        found.service, connection_pool_class=_SentinelPool, **found.options, **options
    )
    return master


def connect_blocking(url: str) -> SyncRedis:
    """A client for a thread that may wait; see `connect`."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": CALL_TIMEOUT_S,
        "socket_connect_timeout": CALL_TIMEOUT_S,
    }
    found = sentinel_address(url)
    if found is None:
        return SyncRedis.from_url(url, **options)
    of_sentinels = {**found.sentinel_options, **options}
    sentinel: Any = SyncSentinel(found.sentinels, sentinel_kwargs=of_sentinels)  # type: ignore[no-untyped-call]
    master: SyncRedis = sentinel.master_for(
        found.service, connection_pool_class=_BlockingSentinelPool, **found.options, **options
    )
    return master


class _SentinelPool(SentinelConnectionPool):
    """Closes its connections to the sentinels too, which redis-py leaves open."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        for client in self.sentinel_manager.sentinels:
            await client.aclose()


class _BlockingSentinelPool(SyncSentinelConnectionPool):
    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        for client in self.sentinel_manager.sentinels:
            client.close()


def check_reachable(url: str) -> list[str]:
    """Blocking. Returns what may lose the catalog at this Redis, a sentence a risk.

    Raises ConfigError. Its message omits the URL, which may hold a password.
    """
    try:
        client = connect_blocking(url)
    except ValueError as error:
        raise ConfigError(
            "redis_url: not a URL such as redis://HOST:6379/0", field="redis_url"
        ) from error
    try:
        client.ping()
        return risks_of(client)
    except Unreachable as error:
        raise ConfigError(f"redis_url: no Redis answers: {error}", field="redis_url") from error
    finally:
        client.close()


def risks_of(client: SyncRedis) -> list[str]:
    """Reads what this user may read; what is not shown is not a risk."""
    facts: dict[str, str] = {}
    for section in ("memory", "persistence"):
        with contextlib.suppress(ResponseError):
            facts |= {str(name): str(value) for name, value in client.info(section).items()}
    with contextlib.suppress(ResponseError):
        facts["save"] = str(client.config_get("save")["save"])
    return risks(facts)


def prefix(fleet: str) -> str:
    """Processes with another schema use other keys: during an upgrade they do not meet."""
    return f"lf{SCHEMA}:{fleet}:"


def channel_name(redis: Redis, name: str) -> str:
    """The same fleet's name may be in use in another database, but channels know no databases."""
    return f"{name}@{redis.connection_pool.connection_kwargs.get('db') or 0}"


async def call(reply: Awaitable[Any]) -> Any:
    """Awaits the reply, or raises CatalogUnavailable within CALL_TIMEOUT_S. The message omits the
    URL, which may hold a password."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            answer = await reply
    except Unreachable as error:
        raise CatalogUnavailable(
            f"the fleet's Redis cannot be reached ({type(error).__name__})", retry_after_s=1.0
        ) from error
    heed_cancellation()
    return answer


def heed_cancellation() -> None:
    """Raises a cancellation that CPython 3.11 swallowed: one that comes just before a timeout of 0
    is taken for the timeout. redis-py uses such a timeout to check a connection."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Subscription:
    """Follows one channel of numbered JSON messages until cancelled.

                     ┌── error, or silence longer than silence_s twice ──┐
                     v                                                   │
        ──> WAIT ── subscribe ──> resync (whole snapshot) ──> LIVE ──────┘
                                       ^                       │
                                       └──── apply says gap ───┘

    apply(message) returns False if it sees a gap; then resync() reads the whole state. The
    subscription comes before the snapshot, so no message is missed. apply must ignore messages that
    the snapshot already covers.
    """

    def __init__(
        self,
        redis: Redis,
        channel: str,
        *,
        apply: Callable[[dict[str, Any]], bool],
        resync: Callable[[], Awaitable[None]],
        silence_s: float = 1.0,
    ) -> None:
        self._redis = redis
        self._channel = channel
        self._apply = apply
        self._resync = resync
        self._silence_s = silence_s
        self.connected = False

    async def run(self) -> None:
        delay_s = RECONNECT_FIRST_S
        while True:
            try:
                await self._follow()
            except (*Unreachable, CatalogUnavailable) as error:
                if self.connected:
                    delay_s = RECONNECT_FIRST_S
                    log.warning("%s: lost Redis (%s)", self._channel, type(error).__name__)
            except Exception:  # it starts over: a dead view would be worse
                log.exception("%s: the subscription failed", self._channel)
            finally:
                self.connected = False
            heed_cancellation()
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, RECONNECT_MAX_S)

    async def _follow(self) -> None:
        """Never returns. Raises when the connection is lost."""
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(self._channel)
            await self._confirmed(pubsub)
            await self._resync()
            self.connected = True
            pinged = False
            while True:
                heed_cancellation()
                message = await pubsub.get_message(timeout=self._silence_s)
                if message is None:
                    if pinged:
                        raise TimeoutError("no answer to a ping")
                    await pubsub.ping()
                    pinged = True
                    continue
                pinged = False
                if message["type"] == "message" and not self._understood(message["data"]):
                    await self._resync()

    async def _confirmed(self, pubsub: Any) -> None:
        message = await pubsub.get_message(timeout=COMMAND_TIMEOUT_S)
        if message is None or message["type"] != "subscribe":
            raise TimeoutError("the subscription was not confirmed")

    def _understood(self, data: str) -> bool:
        """An unreadable message counts as a gap: others may write to the same Redis."""
        try:
            return self._apply(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: unreadable message (%s)", self._channel, error)
            return False
