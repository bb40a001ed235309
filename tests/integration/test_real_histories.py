"""Random histories of live replicas on a real Redis; `tests/catalog_histories.py` has the rule."""

import asyncio
import contextlib
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from cluster.config import FleetConfig
from cluster.errors import BadRequest, CatalogUnavailable, ModelNotFound
from cluster.redis_client import prefix
from replica.serving.membership import Membership
from tests.integration.test_foreign_redis import Server
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import until
from tests.wire import Wire

# A wire that is cut may have accepted a connection of which its loop knows nothing yet. That ends
# with the loop, and Python warns of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*(_SelectorTransport|socket.socket)"
    ":pytest.PytestUnraisableExceptionWarning"
)

LEASE_S, REPORT_S, ACKNOWLEDGE_S = 1.0, 0.05, 0.5
REPLICAS = 3
NAMES = "abc"
STEPS = 14


@dataclass(frozen=True, slots=True)
class Write:
    """index: the order of the calls. digest: None: a removal. applied: who said that it has it."""

    index: int
    name: str
    digest: str | None
    applied: frozenset[str] = frozenset()


@dataclass
class Replica:
    id: str
    wire: Wire
    membership: Membership
    engine: StubEngine
    away: bool = False


class History:
    def __init__(self, seed: int, fleet: str, directory: Path, server: Server) -> None:
        self.draw = random.Random(seed)
        self.fleet, self.directory, self.server = fleet, directory, server
        self.replicas: list[Replica] = []
        self.started = 0
        self.writes: list[Write] = []
        self.config = FleetConfig(
            engine=settled_config(write_model_config(directory / "base")),
            name=fleet,
            adapter_roots=(str(directory),),
            directory=str(directory / "fleet"),
            lease_s=LEASE_S,
            report_s=REPORT_S,
            acknowledge_s=ACKNOWLEDGE_S,
        )

    async def start(self) -> None:
        self.started += 1
        wire, engine = Wire(self.server.port), StubEngine()
        await wire.join()
        settings: dict[str, Any] = {"redis_url": f"redis://127.0.0.1:{wire.port}/0"}
        config = FleetConfig(**{n: getattr(self.config, n) for n in _FIELDS} | settings)
        membership = Membership(engine, config, f"r{self.started}")
        self.replicas.append(Replica(f"r{self.started}", wire, membership, engine))
        await membership.start()

    async def stop(self) -> None:
        for replica in self.replicas:
            await replica.membership.stop()
            await replica.wire.cut()

    async def step(self) -> None:
        kinds = ["write"] * 12 + ["save", "save", "partition", "heal", "heal"]
        await getattr(
            self, f"_{self.draw.choice([*kinds, 'kill', 'flush', 'evict', 'rollback'])}"
        )()

    async def _write(self) -> None:
        adapters = self.draw.choice(self.replicas).membership
        name, index = self.draw.choice(NAMES), len(self.writes)
        removes = self.draw.random() < 0.3
        path = "" if removes else write_adapter(self.directory / f"w{index}", seed=index)
        digest, applied = None if removes else f"unknown {index}", frozenset[str]()
        try:
            if removes:
                done = await adapters.remove(name)
            else:
                done = await adapters.add(name, path, load_inplace=True)
                digest = done.digest
            applied = frozenset(done.applied)
        except (BadRequest, ModelNotFound):
            return
        except CatalogUnavailable:
            pass  # it may be in Redis all the same
        self.writes.append(Write(index, name, digest, applied))

    async def _save(self) -> None:
        await asyncio.to_thread(self._redis, "save")

    async def _partition(self) -> None:
        replica = self.draw.choice(self.replicas)
        replica.away = True
        await replica.wire.cut()

    async def _heal(self) -> None:
        for replica in self.replicas:
            replica.away = False
            await replica.wire.join()

    async def _kill(self) -> None:
        replica = self.replicas.pop(self.draw.randrange(len(self.replicas)))
        await replica.wire.cut()
        await replica.membership.stop()
        await self.start()

    async def _flush(self) -> None:
        await asyncio.to_thread(self._redis, "flushall")

    async def _evict(self) -> None:
        key = self.draw.choice(("catalog", "catalog:state", "incarnations", "residency:state"))
        await asyncio.to_thread(self._redis, "delete", prefix(self.fleet) + key)

    async def _rollback(self) -> None:
        """The server dies and comes back with its last snapshot."""
        self.server.kill()
        await asyncio.to_thread(self.server.start)

    def _redis(self, command: str, *arguments: str) -> None:
        with Redis.from_url(self.server.url) as client, contextlib.suppress(RedisError):
            getattr(client, command)(*arguments)

    async def agree(self) -> None:
        """With all faults over, the copies and the page that describes the fleet are the same."""
        await self._heal()
        await until(self._agreed)

    async def _agreed(self) -> bool:
        memberships = [replica.membership for replica in self.replicas]
        catalogs = [membership._catalog for membership in memberships]
        if not all(c.connected and c.settles_in_s is None for c in catalogs):
            return False
        if len({catalog.stamp for catalog in catalogs}) > 1:
            return False
        try:
            page = await memberships[0].describe()
        except CatalogUnavailable:
            return False
        held = {entry["id"]: entry["digest"] for entry in page["data"]}
        return all({v.name: v.digest for v in m.versions()} == held for m in memberships)

    def check(self) -> None:
        alive = {replica.id for replica in self.replicas}
        held = {v.name: v.digest for v in self.replicas[0].membership.versions()}
        for name in NAMES:
            writes = [write for write in self.writes if write.name == name]
            required = max((w.index for w in writes if w.applied & alive), default=None)
            if required is None:
                continue
            allowed = [write for write in writes if write.index >= required]
            fits = any(
                write.digest == held.get(name)
                or (name in held and write.digest == f"unknown {write.index}")
                for write in allowed
            )
            assert fits, f"{name} is {held.get(name)}, must be one of {allowed}"

    async def residency_is_true(self) -> bool:
        try:
            page = await self.replicas[0].membership.describe()
        except CatalogUnavailable:
            return False
        told: dict[str, set[str]] = {replica["id"]: set() for replica in page["replicas"]}
        for entry in page["data"]:
            for replica_id in entry["residency"]:
                told[replica_id].add(entry["digest"])
        return told == {
            replica.id: {state.digest for state in replica.engine.adapter_states()}
            for replica in self.replicas
        }


_FIELDS = ["engine", "name", "adapter_roots", "directory", "lease_s", "report_s", "acknowledge_s"]


@pytest.mark.parametrize("number", range(20))
async def test_no_change_that_a_living_replica_acknowledged_is_lost(
    tmp_path: Path, fleet: str, seed: int, number: int
) -> None:
    server = Server(tmp_path / "redis", "--save", "3600", "1")
    server.start()
    history = History(seed + number, fleet, tmp_path, server)
    try:
        for _ in range(REPLICAS):
            await history.start()
        for _ in range(STEPS):
            await history.step()
        await history.agree()
        history.check()
        since_s = time.monotonic()
        await until(history.residency_is_true)
        took_s = time.monotonic() - since_s
        print(f"history {seed + number}: {len(history.writes)} writes, residency {took_s:.2f} s")
    finally:
        await history.stop()
        server.kill()
        shutil.rmtree(tmp_path, ignore_errors=True)
