"""A replica in a fleet, with a real Redis and a stub engine: all replicas share one book."""

import asyncio
import contextlib
import dataclasses
import math
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
import redis.asyncio

from cluster.adapter_paths import TENSORS_FILE
from cluster.catalog import Catalog, found
from cluster.config import FleetConfig
from cluster.errors import (
    AdapterFailed,
    AdapterRefused,
    BadRequest,
    CatalogUnavailable,
    ConfigError,
    ModelNotFound,
    ShuttingDown,
)
from cluster.publisher import Publisher
from cluster.recovery import encode_version
from cluster.redis_client import connect, prefix
from cluster.redis_server import RedisServer
from cluster.registry import FleetView
from cluster.values import AdapterState, LoadReport, Tier, Version
from replica.adapters.adapter_files import inspect
from replica.api.interfaces import Acknowledgement, NewAdapter
from replica.model.shape import read_shape
from replica.serving.changes import SEEDED_AT_ONCE
from replica.serving.membership import Membership
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, until

# Many reports per lease, so that a replica without a core for a while is not taken for dead.
LEASE_S, REPORT_S = 2.0, 0.05


class GatedEngine(StubEngine):
    """Registers a version only when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def register(self, version: Version, path: str) -> None:
        await asyncio.to_thread(self.gate.wait, TIMEOUT_S)
        await super().register(version, path)


class Fleet:
    """Replicas that run until the test ends, and adapter files for them."""

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "adapters"
        self.config = FleetConfig(
            engine=settled_config(write_model_config(directory / "base")),
            name=name,
            adapter_roots=(str(self.root),),
            directory=str(directory / "fleet"),
            lease_s=LEASE_S,
            report_s=REPORT_S,
            acknowledge_s=TIMEOUT_S,
        )
        self.replicas: list[tuple[Membership, StubEngine]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.clients: list[redis.asyncio.Redis] = []

    def adapter(self, name: str, *, rank: int = 2, seed: int = 0) -> str:
        return write_adapter(self.root / name, rank=rank, seed=seed)

    async def replica(
        self,
        url: str,
        replica_id: str = "r1",
        *,
        run: str | None = None,
        engine_kind: type[StubEngine] = StubEngine,
        **config: object,
    ) -> tuple[Membership, StubEngine]:
        if not self.replicas:
            with contextlib.suppress(redis.ConnectionError):
                found(url, self.config.name)
        engine = engine_kind()
        settings = dataclasses.replace(self.config, redis_url=url, **config)  # type: ignore[arg-type]
        membership = Membership(engine, settings, replica_id, run=run)
        self.replicas.append((membership, engine))
        await membership.start()
        return membership, engine

    async def view(self, url: str) -> FleetView:
        view = FleetView(url, self.config.name, silence_s=0.2)
        self.tasks.append(asyncio.create_task(view.run()))
        await until(lambda: view.connected)
        return view

    def silent(self, url: str, replica_id: str) -> None:
        """A live replica that never applies a change."""
        self.clients.append(connect(url))
        publisher = Publisher(
            self.clients[-1],
            self.config.name,
            replica_id,
            lease_s=LEASE_S,
            report_s=REPORT_S,
            residency=list[AdapterState],
            report=LoadReport,
        )
        self.tasks.append(asyncio.create_task(publisher.run()))

    async def close(self) -> None:
        for membership, _ in self.replicas:
            await asyncio.wait_for(membership.stop(), TIMEOUT_S)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for client in self.clients:
            await client.aclose()


@pytest.fixture
async def running(fleet: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    running = Fleet(fleet, tmp_path)
    yield running
    await running.close()


def digests(engine: StubEngine) -> set[str]:
    return {entry.digest for entry in engine.adapter_states()}


async def test_an_added_adapter_is_known_by_all_when_the_call_returns(
    shared_redis: str, running: Fleet
) -> None:
    one, first = await running.replica(shared_redis, "r1")
    other, second = await running.replica(shared_redis, "r2")
    done = await one.add("a", running.adapter("a"))
    assert (done.name, done.sequence, done.pending) == ("a", 1, ())
    assert digests(first) == digests(second) == {done.digest}
    version = await other.find("a")
    assert version is not None and (version.digest, version.rank) == (done.digest, 2)
    assert one.versions() == other.versions() == [version]

    gone = await other.remove("a")
    assert (gone.digest, gone.sequence, gone.pending) == (done.digest, 2, ())
    assert digests(first) == digests(second) == set()
    assert await one.find("a") is None and await other.find("a") is None
    with pytest.raises(ModelNotFound):
        await one.remove("a")


async def test_the_configured_adapters_are_there_when_it_starts(
    shared_redis: str, running: Fleet
) -> None:
    adapters = {"a": running.adapter("a"), "b": running.adapter("b", seed=1)}
    view = await running.view(shared_redis)
    one, engine = await running.replica(shared_redis, adapters=adapters, adapter_roots=())
    assert [version.name for version in one.versions()] == ["a", "b"]
    await until(lambda: [v.name for v in view.book.by_name()] == ["a", "b"])
    await until(lambda: "r1" in view.replicas)
    assert set(view.replicas["r1"].residency) == digests(engine)  # at first sight
    assert len(digests(engine)) == 2


async def test_a_name_that_nobody_registered_is_found_in_a_directory(
    shared_redis: str, running: Fleet
) -> None:
    running.adapter("a")
    sources = {"adapter_sources": (str(running.root),), "adapter_roots": ()}
    one, first = await running.replica(shared_redis, "r1", **sources)
    other, second = await running.replica(shared_redis, "r2", **sources)
    claims = await asyncio.gather(one.claim("a"), other.claim("a"))
    for claim in claims:
        assert claim is not None
        assert digests(first) == digests(second) == {claim.version.digest}
        claim.release()
    assert await one.claim("nothing") is None
    assert [version.name for version in other.versions()] == ["a"]


async def test_a_configured_adapter_that_is_no_good_ends_the_start(
    shared_redis: str, running: Fleet
) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.a") as caught:
        await running.replica(shared_redis, adapters={"a": str(running.root / "nothing")})
    assert caught.value.field == "adapters.a"


async def test_paths_outside_the_roots_are_refused_and_nothing_is_registered(
    shared_redis: str, running: Fleet, tmp_path: Path
) -> None:
    one, engine = await running.replica(shared_redis)
    outside = write_adapter(tmp_path / "elsewhere")
    running.root.mkdir()
    (running.root / "link").symlink_to(outside)
    for path in (outside, f"{running.root}/../elsewhere", str(running.root / "link"), "/etc"):
        with pytest.raises(BadRequest, match="the allowed adapter roots") as caught:
            await one.add("a", path)
        assert caught.value.field == "lora_path"
        assert path in caught.value.message
    assert (one.versions(), digests(engine)) == ([], set())
    assert (await one.add("a", outside, trusted=True)).pending == ()


async def test_an_image_larger_than_the_memory_is_refused_naming_both_numbers(
    shared_redis: str, running: Fleet
) -> None:
    engine_config = dataclasses.replace(running.config.engine, adapter_memory=200)
    one, engine = await running.replica(shared_redis, engine=engine_config)
    with pytest.raises(AdapterRefused, match=r"256 bytes.*200"):
        await one.add("a", running.adapter("a"))  # 2 layers × rank 2 × 16 × 4 bytes
    assert (one.versions(), digests(engine)) == ([], set())


async def test_a_taken_name_is_refused_and_the_base_models_too(
    shared_redis: str, running: Fleet
) -> None:
    one, _ = await running.replica(shared_redis)
    done = await one.add("a", running.adapter("a"))
    for name in ("a", "base"):
        with pytest.raises(BadRequest) as caught:
            await one.add(name, running.adapter("b", seed=1))
        assert caught.value.field == "lora_name"
    version = await one.find("a")
    assert version is not None and version.digest == done.digest


async def test_a_claimed_version_of_a_re_pointed_name_stays_until_its_release(
    shared_redis: str, running: Fleet
) -> None:
    one, engine = await running.replica(shared_redis)
    old = await one.add("a", running.adapter("a"))
    claims = [await one.claim("a"), await one.claim("a")]
    change = asyncio.create_task(one.add("a", running.adapter("b", seed=1), load_inplace=True))
    await until(lambda: len(digests(engine)) == 2)
    later = await one.claim("a")
    assert later is not None and later.version.digest != old.digest
    for claim in claims:
        await one.describe()  # a round through the membership's loop
        assert digests(engine) == {old.digest, later.version.digest}
        assert claim is not None and claim.version.digest == old.digest
        claim.release()
        claim.release()
    new = await change
    assert (new.digest, new.pending) == (later.version.digest, ())
    assert digests(engine) == {new.digest}


async def test_a_claimed_version_of_a_removed_name_stays_until_its_release(
    shared_redis: str, running: Fleet
) -> None:
    one, engine = await running.replica(shared_redis)
    old = await one.add("a", running.adapter("a"))
    claim = await one.claim("a")
    assert claim is not None
    change = asyncio.create_task(one.remove("a"))
    await until(lambda: one.versions() == [])
    await one.describe()
    assert await one.claim("a") is None
    assert digests(engine) == {old.digest}
    claim.release()
    assert (await change).pending == ()
    assert digests(engine) == set()


async def test_a_version_added_elsewhere_is_claimed_once_the_engine_has_it(
    shared_redis: str, running: Fleet
) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    slow, engine = await running.replica(shared_redis, "r2", engine_kind=GatedEngine)
    assert isinstance(engine, GatedEngine)
    adding = asyncio.create_task(one.add("a", running.adapter("a")))
    await until(lambda: one.versions() != [])
    claiming = asyncio.create_task(slow.claim("a"))
    engine.gate.set()
    claim = await claiming
    assert claim is not None and digests(engine) == {claim.version.digest}
    claim.release()
    await adding


async def test_a_request_that_waits_for_files_gets_the_version_that_the_name_points_at_then(
    shared_redis: str, running: Fleet
) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    slow, engine = await running.replica(shared_redis, "r2", engine_kind=GatedEngine)
    assert isinstance(engine, GatedEngine)
    adding = asyncio.create_task(one.add("a", running.adapter("a")))
    await until(lambda: slow.versions() != [])
    old = slow.versions()[0].digest
    claiming = asyncio.create_task(slow.claim("a"))
    finding = asyncio.create_task(slow.find("a"))
    pointing = asyncio.create_task(one.add("a", running.adapter("b", seed=1), load_inplace=True))
    await until(lambda: slow.versions()[0].digest != old)
    engine.gate.set()
    claim, version = await claiming, await finding
    new = (await pointing).digest
    assert claim is not None and version is not None
    assert (claim.version.digest, version.digest) == (new, new)
    claim.release()
    await adding


async def test_a_request_that_waits_for_files_of_a_removed_name_finds_nothing(
    shared_redis: str, running: Fleet
) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    slow, engine = await running.replica(shared_redis, "r2", engine_kind=GatedEngine)
    assert isinstance(engine, GatedEngine)
    adding = asyncio.create_task(one.add("a", running.adapter("a")))
    await until(lambda: slow.versions() != [])
    claiming = asyncio.create_task(slow.claim("a"))
    removing = asyncio.create_task(one.remove("a"))
    await until(lambda: slow.versions() == [])
    engine.gate.set()
    assert await claiming is None
    await adding
    await removing


async def test_a_name_is_re_pointed_everywhere_and_the_old_version_goes(
    shared_redis: str, running: Fleet
) -> None:
    one, first = await running.replica(shared_redis, "r1")
    other, second = await running.replica(shared_redis, "r2")
    old = await one.add("a", running.adapter("a"))
    new = await other.add("a", running.adapter("b", seed=1), load_inplace=True)
    assert new.pending == () and new.digest != old.digest
    for membership, engine in ((one, first), (other, second)):
        version = await membership.find("a")
        assert version is not None and version.digest == new.digest
        assert digests(engine) == {new.digest}


async def test_a_version_stays_while_any_name_points_at_it(
    shared_redis: str, running: Fleet
) -> None:
    one, engine = await running.replica(shared_redis)
    path = running.adapter("a")
    digest = (await one.add("a", path)).digest
    await one.add("b", path)
    await one.remove("a")
    assert digests(engine) == {digest}
    assert await one.find("b") is not None
    await one.remove("b")
    assert digests(engine) == set()


async def test_each_node_has_its_own_copy_when_an_add_is_acknowledged(
    shared_redis: str, running: Fleet, tmp_path: Path
) -> None:
    nodes = [str(tmp_path / name) for name in ("one", "two")]
    one, first = await running.replica(shared_redis, "r1", directory=nodes[0])
    _, second = await running.replica(shared_redis, "r2", directory=nodes[1])
    _, beside = await running.replica(shared_redis, "r3", directory=nodes[1])
    done = await one.add("a", running.adapter("a"))
    assert done.pending == ()
    shutil.rmtree(running.root / "a")
    shape = read_shape(running.config.engine.model)
    for engine, node in ((first, nodes[0]), (second, nodes[1]), (beside, nodes[1])):
        assert engine.paths == {done.digest: f"{node}/adapters/{done.digest}"}
        assert inspect(engine.paths[done.digest], shape, 2).digest == done.digest
    _, late = await running.replica(shared_redis, "r4", directory=nodes[1])
    assert late.paths.keys() == {done.digest}, "it starts with the node's copy"


async def test_a_new_node_copies_from_whichever_directory_is_left(
    shared_redis: str, running: Fleet, tmp_path: Path
) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    digests_added = {(await one.add(name, running.adapter(name))).digest for name in "ab"}
    shutil.rmtree(running.root / "a")
    other, engine = await running.replica(shared_redis, "r2", directory=str(tmp_path / "new"))
    assert digests(engine) == digests_added and len(digests_added) == 1
    assert await other.find("a") is not None


async def test_a_node_that_cannot_copy_the_files_says_so(
    shared_redis: str, running: Fleet, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    one, _ = await running.replica(shared_redis, "r1")
    other, engine = await running.replica(shared_redis, "r2", directory=str(tmp_path / "file"))
    done = await one.add("a", running.adapter("a"))
    assert digests(engine) == set()
    with pytest.raises(AdapterFailed, match=f"the store {tmp_path}/file/adapters failed"):
        await other.find("a")
    with pytest.raises(AdapterFailed) as caught:
        await other.add("b", running.adapter("b"))
    assert caught.value.status == 507
    assert [version.digest for version in one.versions()] == [done.digest]


async def test_many_are_added_in_one_change_and_known_by_all(
    shared_redis: str, running: Fleet
) -> None:
    one, first = await running.replica(shared_redis, "r1")
    other, second = await running.replica(shared_redis, "r2")
    new = [NewAdapter(f"a{i}", running.adapter(f"a{i}", seed=i)) for i in range(100)]
    done = await one.add_all(new)
    assert [each.name for each in done] == [each.name for each in new]
    assert {(each.sequence, each.pending) for each in done} == {(1, ())}
    assert digests(first) == digests(second) == {each.digest for each in done}
    assert len(other.versions()) == 100


async def test_of_many_all_are_added_or_none(shared_redis: str, running: Fleet) -> None:
    one, engine = await running.replica(shared_redis)
    good = [NewAdapter(f"a{i}", running.adapter(f"a{i}", seed=i)) for i in range(40)]
    await one.add("old", running.adapter("old", seed=99))
    bad = {
        "lora_path": NewAdapter("bad", str(running.root / "nothing")),
        "lora_name": NewAdapter("old", running.adapter("new", seed=98)),
    }
    for field, each in bad.items():
        with pytest.raises(BadRequest) as caught:
            await one.add_all([*good, each])
        assert caught.value.field == field
    with pytest.raises(BadRequest, match="comes twice"):
        await one.add_all([*good, good[0]])
    assert [v.name for v in one.versions()] == ["old"]
    assert len(digests(engine)) == 1


async def test_many_with_pins_that_leave_no_room_are_refused(
    shared_redis: str, running: Fleet
) -> None:
    paths = [running.adapter(f"a{i}", seed=i) for i in range(3)]
    engine = dataclasses.replace(running.config.engine, adapter_memory=256 * 2)
    one, _ = await running.replica(shared_redis, engine=engine)
    with pytest.raises(AdapterRefused, match="pinned adapters take 512"):
        await one.add_all([NewAdapter(f"a{i}", path, i < 2) for i, path in enumerate(paths)])
    assert one.versions() == []
    await one.add_all([NewAdapter(f"a{i}", path, i < 1) for i, path in enumerate(paths)])
    assert len(one.versions()) == 3


async def test_hundreds_of_configured_adapters_are_there_when_it_starts(
    shared_redis: str, running: Fleet
) -> None:
    adapters = {f"a{i}": running.adapter(f"a{i}", seed=i) for i in range(SEEDED_AT_ONCE + 10)}
    one, engine = await running.replica(shared_redis, adapters=adapters, run="run")
    assert {version.name for version in one.versions()} == adapters.keys()
    assert len(digests(engine)) == len(adapters)
    other, _ = await running.replica(shared_redis, "r2", adapters=adapters, run="run")
    assert other.versions() == one.versions()


class Patience:
    """The clock of a replica that waits for others. It times out when the test says."""

    def __init__(self) -> None:
        self._looks_left = math.inf

    def monotonic(self) -> float:
        self._looks_left -= 1
        if self._looks_left >= 0:
            return 0.0
        self._looks_left = math.inf
        return math.inf

    async def pending(
        self, change: Awaitable[Acknowledgement], view: FleetView, sequence: int, *applied: str
    ) -> tuple[str, ...]:
        """The replicas reported as pending when only `applied` have applied the change."""
        return (await self.done(change, view, sequence, *applied)).pending

    async def done(
        self, change: Awaitable[Acknowledgement], view: FleetView, sequence: int, *applied: str
    ) -> Acknowledgement:
        waiting = asyncio.ensure_future(change)
        await until(lambda: all(view.replicas[r].catalog[1] >= sequence for r in applied))
        self._looks_left = 1  # what is known at the first one may be from before that
        return await waiting


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Patience:
    patience = Patience()
    monkeypatch.setattr("replica.serving.membership.time", patience)
    return patience


async def test_a_silent_replica_is_named(
    shared_redis: str, running: Fleet, patience: Patience
) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    await running.replica(shared_redis, "r2")
    view = await running.view(shared_redis)
    running.silent(shared_redis, "silent")
    await until(lambda: set(view.replicas) == {"r1", "r2", "silent"})
    adding = one.add("a", running.adapter("a"))
    assert await patience.pending(adding, view, 1, "r1", "r2") == ("silent",)
    assert await patience.pending(one.remove("a"), view, 2, "r1", "r2") == ("silent",)


async def test_an_add_says_who_has_it_who_could_not_read_it_and_who_did_not_answer(
    shared_redis: str, running: Fleet, patience: Patience
) -> None:
    class Unreadable(StubEngine):
        async def register(self, version: Version, path: str) -> None:
            raise AdapterFailed("no such directory here")

    one, _ = await running.replica(shared_redis, "r1")
    await running.replica(shared_redis, "r2", engine_kind=Unreadable)
    view = await running.view(shared_redis)
    running.silent(shared_redis, "silent")
    await until(lambda: set(view.replicas) == {"r1", "r2", "silent"})
    adding = one.add("a", running.adapter("a"))
    done = await patience.done(adding, view, 1, "r1", "r2")
    assert (done.applied, done.pending) == (("r1",), ("silent",))
    assert done.failed == {"r2": "no such directory here"}
    gone = await patience.done(one.remove("a"), view, 2, "r1", "r2")
    assert (gone.applied, gone.failed, gone.pending) == (("r1", "r2"), {}, ("silent",))


async def test_an_add_that_is_tried_again_is_success(shared_redis: str, running: Fleet) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    other, _ = await running.replica(shared_redis, "r2")
    path = running.adapter("a")
    done = await one.add("a", path)
    assert await other.add("a", path) == done
    with pytest.raises(BadRequest, match="'a' is already loaded"):
        await other.add("a", path, pinned=True)
    with pytest.raises(BadRequest, match="'a' is already loaded"):
        await other.add("a", running.adapter("b", seed=1))


async def test_a_change_waits_while_redis_may_have_lost_others(
    own_redis: RedisServer, running: Fleet
) -> None:
    one, engine = await running.replica(own_redis.url, "r1")
    other, _ = await running.replica(own_redis.url, "r2")
    old = await one.add("a", running.adapter("a"))
    async with connect(own_redis.url) as client:
        await client.flushall()
        new = await other.add("b", running.adapter("b", seed=1))
        assert (new.applied, new.pending) == (("r1", "r2"), ())
        assert await client.hlen(prefix(running.config.name) + "catalog") == 2
    assert digests(engine) == {old.digest, new.digest}
    assert one.versions() == other.versions() and len(one.versions()) == 2


async def test_an_add_that_redis_loses_while_it_waits_is_acknowledged_once_it_is_back(
    own_redis: RedisServer, running: Fleet
) -> None:
    one, _ = await running.replica(own_redis.url, "r1")
    slow, engine = await running.replica(own_redis.url, "r2", engine_kind=GatedEngine)
    assert isinstance(engine, GatedEngine)
    adding = asyncio.create_task(one.add("a", running.adapter("a")))
    await until(lambda: one.versions() == slow.versions() != [])
    async with connect(own_redis.url) as client:
        await client.flushall()
        generation = prefix(running.config.name) + "catalog:state"
        await until(lambda: _has_field(client, generation, "generation"))
    assert not adding.done()
    engine.gate.set()
    done = await adding
    assert (done.applied, done.failed, done.pending) == (("r1", "r2"), {}, ())
    assert digests(engine) == {done.digest}


async def _has_field(client: redis.asyncio.Redis, key: str, field: str) -> bool:
    return bool(await client.hexists(key, field))


async def test_a_restarted_replica_undoes_no_removal_though_redis_was_emptied(
    own_redis: RedisServer, running: Fleet
) -> None:
    flags = {"a": running.adapter("a"), "b": running.adapter("b", seed=1)}
    one, _ = await running.replica(own_redis.url, "r1", run="run-1", adapters=flags)
    await one.remove("b")
    async with connect(own_redis.url) as client:
        await client.flushall()
    again, _ = await running.replica(own_redis.url, "r2", run="run-1", adapters=flags)
    assert [v.name for v in again.versions()] == ["a"]
    assert [v.name for v in one.versions()] == ["a"]


async def test_a_replica_acknowledges_only_what_its_engine_has(
    shared_redis: str, running: Fleet, patience: Patience
) -> None:
    one, _ = await running.replica(shared_redis, "r1")
    slow, engine = await running.replica(shared_redis, "r2", engine_kind=GatedEngine)
    assert isinstance(engine, GatedEngine)
    view = await running.view(shared_redis)
    await until(lambda: set(view.replicas) == {"r1", "r2"})
    adding = one.add("a", running.adapter("a"))
    assert await patience.pending(adding, view, 1, "r1") == ("r2",)
    finding = asyncio.create_task(slow.find("a"))
    engine.gate.set()
    version = await finding
    assert version is not None and digests(engine) == {version.digest}
    assert (await one.add("b", running.adapter("b", seed=1))).pending == ()


async def test_a_silent_replica_that_dies_holds_nobody_up(
    shared_redis: str, running: Fleet
) -> None:
    one, _ = await running.replica(shared_redis)
    view = await running.view(shared_redis)
    running.silent(shared_redis, "silent")
    await until(lambda: "silent" in view.replicas)
    adding = asyncio.create_task(one.add("a", running.adapter("a")))
    await until(lambda: bool(one.versions()))
    assert not adding.done()
    running.tasks[-1].cancel()  # without a word: only its lease tells
    assert (await adding).pending == ()


async def test_a_replica_that_restarts_is_a_new_incarnation_and_undoes_nothing(
    shared_redis: str, running: Fleet
) -> None:
    flags = {"a": running.adapter("a"), "b": running.adapter("b", seed=1)}
    one, _ = await running.replica(shared_redis, run="run-1", adapters=flags)
    view = await running.view(shared_redis)
    await until(lambda: "r1" in view.replicas)
    api = await one.add("a", running.adapter("c", seed=2), load_inplace=True)
    await one.remove("b")
    await one.stop()
    await until(lambda: not view.replicas)

    again, engine = await running.replica(shared_redis, run="run-1", adapters=flags)
    assert again.incarnation != one.incarnation
    await until(lambda: "r1" in view.replicas)
    assert view.replicas["r1"].incarnation == again.incarnation
    assert [(v.name, v.digest) for v in again.versions()] == [("a", api.digest)]
    assert digests(engine) == {api.digest}
    await again.stop()

    next_run, _ = await running.replica(shared_redis, run="run-2", adapters=flags)
    assert [v.name for v in next_run.versions()] == ["a", "b"]
    version = await next_run.find("a")
    assert version is not None and version.digest != api.digest


async def test_a_dead_engine_takes_its_replica_out_of_view_at_once(
    shared_redis: str, running: Fleet
) -> None:
    _, engine = await running.replica(shared_redis, lease_s=3600.0)
    view = await running.view(shared_redis)
    await until(lambda: "r1" in view.replicas)
    engine.stopped = True
    await until(lambda: not view.replicas)  # an hour before its lease runs out


async def test_what_is_described_is_what_the_engines_hold(
    shared_redis: str, running: Fleet
) -> None:
    one, first = await running.replica(shared_redis, "r1")
    other, second = await running.replica(shared_redis, "r2")
    await one.add("a", running.adapter("a"), pinned=True, weight=2.0)
    await other.add("b", running.adapter("b", rank=4, seed=1))
    await one.add("c", running.adapter("c", seed=2))
    await one.remove("c")

    async def described() -> bool:
        page = await other.describe()
        return all(len(entry["residency"]) == 2 for entry in page["data"])

    await until(described)
    page = await one.describe()
    assert page["object"] == "list" and page["sequence"] == 4
    assert [(e["id"], e["rank"], e["pinned"], e["weight"]) for e in page["data"]] == [
        ("a", 2, True, 2.0),
        ("b", 4, False, 1.0),
    ]
    assert page["data"][0]["path"] == str(running.root / "a")
    for replica_id, engine in (("r1", first), ("r2", second)):
        told = {e["digest"]: e["residency"][replica_id] for e in page["data"]}
        assert told == {
            r.digest: {"tier": r.tier, "bytes": r.bytes, "since": r.since_s, "reason": r.reason}
            for r in engine.adapter_states()
        }
    assert [r["id"] for r in page["replicas"]] == ["r1", "r2"]
    assert page["replicas"][0]["incarnation"] == one.incarnation
    assert page["replicas"][0]["load"] == dataclasses.asdict(first.report())


async def test_a_pin_that_leaves_no_room_is_refused_and_nothing_registered(
    shared_redis: str, running: Fleet
) -> None:
    path, other = running.adapter("a"), running.adapter("b", seed=1)
    one, _ = await running.replica(shared_redis)
    await one.add("a", path)
    (version,) = one.versions()
    size = version.parameters * 4
    memory = dataclasses.replace(running.config.engine, adapter_memory=size * 2 - 1)
    two, _ = await running.replica(shared_redis, "r2", engine=memory)
    with pytest.raises(AdapterRefused, match=f"pinned adapters take {size}") as caught:
        await two.add("b", other, pinned=True)
    assert caught.value.field == "lora_path"
    assert [v.name for v in two.versions()] == ["a"]
    await two.add("b", other)
    assert [v.name for v in two.versions()] == ["a", "b"]


async def test_two_names_of_one_version_share_the_pin_and_the_larger_weight(
    shared_redis: str, running: Fleet
) -> None:
    class Told(StubEngine):
        told: list[Version]

        async def register(self, version: Version, path: str) -> None:
            self.told = [*getattr(self, "told", []), version]
            await super().register(version, path)

    one, engine = await running.replica(shared_redis, engine_kind=Told)
    path = running.adapter("a")
    await one.add("a", path, pinned=True, weight=0.5)
    await one.add("b", path, weight=2.0)
    assert isinstance(engine, Told)
    assert [(v.pinned, v.weight) for v in engine.told] == [(True, 0.5), (True, 2.0)]


async def put_without_a_message(client: redis.asyncio.Redis, fleet: str, version: Version) -> None:
    """In one step, as changes are made; else a replica that looks meanwhile sees a broken book."""
    root = prefix(fleet)
    state = await client.hgetall(root + "catalog:state")
    sequence = int(state.get("sequence", 0)) + 1
    record = f'{{"stamp":[{state["generation"]},{sequence}],"version":{encode_version(version)}}}'
    async with client.pipeline(transaction=True) as change:
        change.hset(root + "catalog:state", "sequence", str(sequence))
        change.hincrby(root + "catalog:state", "count", 1)
        change.hset(root + "catalog", version.name, record)
        await change.execute()


async def test_a_name_whose_message_was_lost_is_served(shared_redis: str, running: Fleet) -> None:
    one, engine = await running.replica(shared_redis)
    path = running.adapter("a")
    digest = inspect(path, read_shape(running.config.engine.model), 2).digest
    version = Version("lost", digest, path, 2, 10)
    async with connect(shared_redis) as client:
        await put_without_a_message(client, running.config.name, version)
    assert await one.find("lost") == version
    assert digests(engine) == {version.digest}


async def test_a_change_whose_message_was_lost_is_noticed_without_a_request(
    shared_redis: str, running: Fleet
) -> None:
    one, _ = await running.replica(shared_redis)
    path = running.adapter("a")
    digest = inspect(path, read_shape(running.config.engine.model), 2).digest
    version = Version("lost", digest, path, 2, 10)
    async with connect(shared_redis) as client:
        await put_without_a_message(client, running.config.name, version)
    await until(lambda: one.versions() == [version])


async def test_files_that_cannot_be_fetched_fail_their_adapter_alone(
    shared_redis: str, running: Fleet
) -> None:
    one, engine = await running.replica(shared_redis)
    async with connect(shared_redis) as client:
        catalog = Catalog(client, running.config.name, "base")
        bad = Version("bad", "f" * 64, "nosuchscheme://bucket/bad", 2, 10)
        await catalog.put(bad)
    done = await one.add("good", running.adapter("good"))
    assert done.pending == ()
    assert digests(engine) == {done.digest}
    with pytest.raises(AdapterFailed, match="nosuchscheme") as caught:
        await one.find("bad")
    assert caught.value.retry_after_s is not None

    async def told() -> bool:
        page = await one.describe()
        where = page["data"][0]["residency"].get("r1", {})
        return where.get("tier") == "failed" and "nosuchscheme" in where["reason"]

    await until(told)


async def test_files_that_are_repaired_in_place_are_tried_at_once(
    shared_redis: str, running: Fleet, tmp_path: Path
) -> None:
    engine = dataclasses.replace(running.config.engine, load_retry_s=1e6, load_retry_max_s=1e6)
    path = running.adapter("a")
    one, _ = await running.replica(shared_redis, "r1", directory=str(tmp_path / "one"))
    done = await one.add("a", path)
    (running.root / "a").rename(tmp_path / "away")
    other, _ = await running.replica(
        shared_redis, "r2", directory=str(tmp_path / "two"), engine=engine
    )
    for _ in range(2):
        with pytest.raises(AdapterFailed, match="No such file"):
            await other.find("a")
    (tmp_path / "away").rename(running.root / "a")
    found = await other.find("a")
    assert found is not None and found.digest == done.digest


async def test_an_add_of_what_has_failed_is_tried_at_once(
    shared_redis: str, running: Fleet, tmp_path: Path
) -> None:
    engine = dataclasses.replace(running.config.engine, load_retry_s=1e6, load_retry_max_s=1e6)
    one, _ = await running.replica(shared_redis, "r1", directory=str(tmp_path / "one"))
    done = await one.add("a", running.adapter("a"))
    (running.root / "a").rename(tmp_path / "away")
    _, second = await running.replica(
        shared_redis, "r2", directory=str(tmp_path / "two"), engine=engine
    )
    assert digests(second) == set()
    (tmp_path / "away").rename(running.root / "a")
    again = await one.add("a", running.adapter("a"))
    assert (again.digest, again.failed, again.pending) == (done.digest, {}, ())
    assert digests(second) == {done.digest}


async def test_an_add_repairs_the_copy_that_an_engine_could_not_load(
    shared_redis: str, running: Fleet
) -> None:
    one, engine = await running.replica(shared_redis, "r1")
    path = running.adapter("a")
    done = await one.add("a", path)
    copy = Path(engine.paths[done.digest]) / TENSORS_FILE
    content = copy.read_bytes()
    copy.chmod(0o644)
    copy.write_bytes(bytes(len(content)))
    view = await running.view(shared_redis)
    await until(lambda: "r1" in view.replicas)
    for callback in engine._callbacks:
        callback([AdapterState(done.digest, Tier.FAILED, 0, 0.0, "zeros")])
    await until(lambda: view.replicas["r1"].residency[done.digest].tier is Tier.FAILED)
    engine.paths.clear()
    await one.add("a", path)
    assert copy.read_bytes() == content
    assert engine.paths.keys() == {done.digest}, "it was registered again, which ends its backoff"


async def test_its_coroutines_run_on_any_loop(shared_redis: str, running: Fleet) -> None:
    one, _ = await running.replica(shared_redis)
    found: list[Version | None] = []

    async def elsewhere() -> None:
        await one.add("a", running.adapter("a"))
        found.extend([await one.find("a"), await one.find("unknown")])

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert found == [one.versions()[0], None]


async def test_without_redis_it_serves_what_it_knows(
    own_redis: RedisServer, running: Fleet
) -> None:
    one, engine = await running.replica(own_redis.url)
    view = await running.view(own_redis.url)
    done = await one.add("a", running.adapter("a"))
    await until(lambda: done.digest in view.replicas["r1"].residency)
    own_redis.stop()
    version = await one.find("a")
    assert version is not None and version.digest == done.digest
    assert [v.name for v in one.versions()] == ["a"]
    assert await one.find("unknown") is None
    path = running.adapter("b", seed=1)
    for write in (one.add("b", path), one.remove("a")):
        with pytest.raises(CatalogUnavailable) as caught:
            await asyncio.wait_for(write, TIMEOUT_S)
        assert caught.value.status == 503
    with pytest.raises(CatalogUnavailable):
        await asyncio.wait_for(one.describe(), TIMEOUT_S)
    await until(lambda: not one.connected)
    assert "r1" in view.replicas
    own_redis.start()
    await until(lambda: one.connected and view.connected)
    assert (await one.add("b", path)).pending == ()
    assert len(digests(engine)) == 2
    await until(lambda: set(view.replicas["r1"].residency) == digests(engine))


async def test_a_redis_that_is_killed_and_comes_back_hears_everything_again(
    own_redis: RedisServer, running: Fleet
) -> None:
    one, engine = await running.replica(own_redis.url)
    done = await one.add("a", running.adapter("a"))
    pid = own_redis.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    async def described() -> bool:
        try:
            page = await one.describe()
        except CatalogUnavailable:
            return False
        return bool(page["data"]) and "r1" in page["data"][0]["residency"]

    await until(lambda: own_redis.pid != pid)
    await until(described)
    assert digests(engine) == {done.digest}


async def test_an_emptied_redis_gets_the_catalog_back(
    own_redis: RedisServer, running: Fleet
) -> None:
    one, _ = await running.replica(own_redis.url, "r1")
    other, engine = await running.replica(own_redis.url, "r2")
    done = await one.add("a", running.adapter("a"))
    async with connect(own_redis.url) as client:
        await client.flushall()
        await until(lambda: _has(client, running.config.name, "a"))
    assert done.pending == () and digests(engine) == {done.digest}
    assert [v.name for v in other.versions()] == ["a"]


async def _has(client: redis.asyncio.Redis, fleet: str, name: str) -> bool:
    return bool(await client.hexists(prefix(fleet) + "catalog", name))


async def test_it_does_not_start_without_redis(running: Fleet, tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailable):
        await running.replica(f"unix://{tmp_path}/nothing.sock", acknowledge_s=0.1)


async def test_after_stopping_it_answers_that_it_stops(shared_redis: str, running: Fleet) -> None:
    one, _ = await running.replica(shared_redis)
    await one.stop()
    await one.stop()
    with pytest.raises(ShuttingDown):
        await one.find("unknown")
