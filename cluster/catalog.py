"""The book of names → versions in Redis. Every process keeps a copy up to date.

lf:{fleet}:epoch              random id, new when Redis starts empty: a reader can tell a sequence
                              that restarted from one it has passed
lf:{fleet}:catalog            hash: name → version record (JSON)
lf:{fleet}:catalog:sequence   number of changes so far
lf:{fleet}:catalog:seeded     hash: name → id of the last run of the fleet whose flags set it
lf:{fleet}:catalog:changes    channel: {epoch, sequence, name, version | null}
"""

import asyncio
import dataclasses
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis

from cluster.errors import CatalogUnavailable
from cluster.redis_client import Subscription, call, prefix
from cluster.values import Version
from cluster.versions import Book, check_name, not_found, taken

log = logging.getLogger(__name__)

LOOKUP_BATCH_MAX = 256

# KEYS: epoch, catalog, sequence, seeded. ARGV: a fresh epoch, channel, the epoch the caller knows.
# A caller with another epoch must resync first, and may have to restore what Redis lost.
_BEGIN = """
local epoch = redis.call('GET', KEYS[1])
if ARGV[3] ~= (epoch or '') then return {'lost', ''} end
if not epoch then
  epoch = ARGV[1]
  redis.call('SET', KEYS[1], epoch)
end
local function commit(name, version)
  redis.call('INCR', KEYS[3])
  local sequence = redis.call('GET', KEYS[3])
  redis.call('PUBLISH', ARGV[2], '{"epoch":"' .. epoch .. '","sequence":' .. sequence
    .. ',"name":' .. cjson.encode(name) .. ',"version":' .. version .. '}')
  return sequence
end
"""

# ARGV: name, record, '1' if an existing name may be replaced, run ('' for a change by the API).
_PUT = (
    _BEGIN
    + """
local name, record, inplace, run = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local current = redis.call('HGET', KEYS[2], name)
if run ~= '' then
  local seeded = redis.call('HGET', KEYS[4], name)
  redis.call('HSET', KEYS[4], name, run)
  if seeded == run then return {'same', redis.call('GET', KEYS[3]) or '0'} end
elseif current and inplace == '0' then
  return {'taken', redis.call('GET', KEYS[3]) or '0'}
end
if current == record then return {'same', redis.call('GET', KEYS[3]) or '0'} end
redis.call('HSET', KEYS[2], name, record)
return {'put', commit(name, record)}
"""
)

# ARGV: name.
_REMOVE = (
    _BEGIN
    + """
local current = redis.call('HGET', KEYS[2], ARGV[4])
if not current then return {'', ''} end
redis.call('HDEL', KEYS[2], ARGV[4])
return {current, commit(ARGV[4], 'null')}
"""
)

_SNAPSHOT = """
return {redis.call('GET', KEYS[1]) or '', redis.call('GET', KEYS[3]) or '0',
  redis.call('HGETALL', KEYS[2])}
"""

# ARGV: the sequence to continue from, then name, record, name, record ...
_RESTORE = (
    _BEGIN
    + """
if redis.call('EXISTS', KEYS[3]) == 1 then return {'', ''} end
redis.call('SET', KEYS[3], ARGV[4])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return {'put', commit('', 'null')}
"""
)

_FIELDS = frozenset(field.name for field in dataclasses.fields(Version))


def encode_version(version: Version) -> str:
    return json.dumps(dataclasses.asdict(version), separators=(",", ":"), sort_keys=True)


def decode_version(record: dict[str, Any]) -> Version:
    """Ignores unknown fields: a newer process may have written them."""
    return Version(**{key: value for key, value in record.items() if key in _FIELDS})


def channel(fleet: str) -> str:
    return prefix(fleet) + "catalog:changes"


class Catalog:
    """One process's copy of the book. Changes go to Redis, and from there to all processes.

    Any thread may read `book`; call everything else on the event loop of `run`.
    restores: write the book back if Redis lost its data. Replicas do; routers do not.
    on_change: called after each change of the copy.
    """

    def __init__(
        self,
        redis: Redis,
        fleet: str,
        base_name: str,
        *,
        restores: bool = False,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.book = Book(base_name)
        self._epoch = ""
        self._restores = restores
        self._on_change = on_change or (lambda: None)
        self._channel = channel(fleet)
        root = prefix(fleet)
        self._keys = [root + k for k in ("epoch", "catalog", "catalog:sequence", "catalog:seeded")]
        self._redis = redis
        self._put = redis.register_script(_PUT)
        self._remove = redis.register_script(_REMOVE)
        self._snapshot = redis.register_script(_SNAPSHOT)
        self._restore = redis.register_script(_RESTORE)
        self._subscription = Subscription(
            redis, self._channel, apply=self._apply, resync=self.resync
        )
        self._lookups: dict[str, asyncio.Future[Version | None]] = {}
        self._lookup_task: asyncio.Task[None] | None = None
        self.synced = False

    @property
    def connected(self) -> bool:
        return self._subscription.connected

    async def run(self) -> None:
        await self._subscription.run()

    async def resync(self) -> None:
        """Reads the whole book from Redis. Raises what Redis raises, or CatalogUnavailable."""
        epoch, sequence, items = await self._read()
        lost = int(sequence) == 0 and self.book.sequence > 0 and epoch != self._epoch
        if lost and self._restores:
            log.warning("Redis lost the catalog; writing back %d", len(self.book.by_name()))
            pairs: list[str] = []
            for version in self.book.by_name():
                pairs += [version.name, encode_version(version)]
            args = [self._channel, epoch, str(self.book.sequence), *pairs]
            await self._call(self._restore, args)
            epoch, sequence, items = await self._read()
        self.book.replace(_decode_all(items), int(sequence))
        self._epoch = epoch
        self.synced = True
        self._on_change()

    async def read(self) -> tuple[int, list[Version]]:
        """(sequence, versions sorted by name), read from Redis now."""
        _, sequence, items = await self._read()
        return int(sequence), sorted(_decode_all(items), key=lambda version: version.name)

    async def seeded(self) -> dict[str, str]:
        """Name → id of the last run whose flags set it."""
        return dict(await call(self._redis.hgetall(self._keys[3])))

    async def put(
        self, version: Version, *, load_inplace: bool = False, run: str = ""
    ) -> tuple[int, bool]:
        """Returns the sequence after the change, and True if the book changed.

        run: id of the fleet's run whose flags name the version; '' for a change by the API. A run
        replaces the name only once, so that a restarted replica keeps later changes by the API.
        Raises BadRequest naming `lora_name`, or CatalogUnavailable.
        """
        check_name(version.name, self.book.base_name)
        outcome, sequence = await self._run(
            self._put, version.name, encode_version(version), str(int(load_inplace)), run
        )
        if outcome == "taken":
            raise taken(version.name)
        return int(sequence), outcome == "put"

    async def remove(self, name: str) -> tuple[int, str]:
        """Returns the sequence of the change and the removed digest. Raises ModelNotFound."""
        record, sequence = await self._run(self._remove, name)
        if not record:
            raise not_found(name)
        return int(sequence), str(json.loads(record)["digest"])

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
                records = await call(self._redis.hmget(self._keys[1], names))
            except CatalogUnavailable as error:
                for future in futures:
                    future.set_exception(error)
                    future.exception()  # marks it retrieved: the caller may be gone
                continue
            for name, future, record in zip(names, futures, records, strict=True):
                future.set_result(_decode(name, record) if record else None)

    async def _read(self) -> tuple[str, str, Sequence[str]]:
        epoch, sequence, items = await call(self._snapshot(keys=self._keys))
        return epoch, sequence, items

    async def _run(self, script: Any, *args: str) -> tuple[str, str]:
        """Runs a change. It resyncs and retries once if Redis restarted empty since the copy."""
        outcome, sequence = await self._call(script, [self._channel, self._epoch, *args])
        if outcome == "lost":
            await self.resync()
            outcome, sequence = await self._call(script, [self._channel, self._epoch, *args])
        if outcome == "lost":
            raise CatalogUnavailable("the fleet's Redis is restarting", retry_after_s=1.0)
        return outcome, sequence

    async def _call(self, script: Any, args: list[str]) -> tuple[str, str]:
        outcome, sequence = await call(script(keys=self._keys, args=[secrets.token_hex(8), *args]))
        return outcome, sequence

    def _apply(self, message: dict[str, Any]) -> bool:
        if message["epoch"] != self._epoch:
            return False
        record = message["version"]
        version = decode_version(record) if record else None
        if not self.book.apply(message["sequence"], message["name"], version):
            return False
        self._on_change()
        return True


def _decode_all(items: Sequence[str]) -> list[Version]:
    pairs = zip(items[::2], items[1::2], strict=True)
    versions = (_decode(name, record) for name, record in pairs)
    return [version for version in versions if version is not None]


def _decode(name: str, record: str) -> Version | None:
    try:
        return decode_version(json.loads(record))
    except (ValueError, TypeError, AttributeError):
        log.warning("catalog: ignoring the record of %r, which cannot be read", name)
        return None
