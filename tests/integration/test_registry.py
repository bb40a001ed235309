"""Adapter states and leases in a real Redis: readers see what replicas publish."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import redis.asyncio

from cluster.catalog import Catalog, found
from cluster.publisher import Publisher
from cluster.recovery import Stamp
from cluster.redis_client import connect, prefix
from cluster.redis_server import RedisServer
from cluster.registry import FleetView, Registry, channel
from cluster.values import AdapterState, LoadReport, Tier, Version
from tests.until import TIMEOUT_S, until

# Many reports per lease, so that a replica without a core for a while is not taken for dead.
LEASE_S, REPORT_S = 2.0, 0.05

LONELY = """
import asyncio, sys
from cluster.catalog import Catalog, found
from cluster.publisher import Publisher
from cluster.redis_client import connect
from cluster.values import LoadReport, AdapterState, Tier
held = [AdapterState("d1", Tier.DEVICE, 10, 1.0)]
async def main():
    publisher = Publisher(connect(sys.argv[1]), sys.argv[2], "lonely",
                          lease_s=float(sys.argv[3]), report_s=0.05,
                          residency=lambda: held, report=LoadReport)
    print(publisher.incarnation, flush=True)
    await publisher.run()
asyncio.run(main())
"""


@dataclass
class Replica:
    """An engine's state, and its publisher."""

    held: dict[str, AdapterState] = field(default_factory=dict)
    load: LoadReport = field(default_factory=LoadReport)
    alive: bool = True
    applied: Stamp = (0, 0)
    told: set[str] = field(default_factory=set)

    def hold(self, digest: str, tier: Tier = Tier.DEVICE, size: int = 10) -> None:
        self.held[digest] = AdapterState(digest, tier, size, 1.0)

    def tell(self, publisher: Publisher) -> None:
        """As an engine does: the states that have changed."""
        gone = self.told - self.held.keys()
        self.told |= self.held.keys()
        absent = [AdapterState(digest, Tier.ABSENT, 0, 1.0) for digest in gone]
        publisher.changed([*self.held.values(), *absent])
        publisher.wake()


@dataclass
class Clock:
    """A view's clock. It advances when the test says, so that leases expire only then."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class Fleet:
    """Publishers and views of one fleet that run until the test ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tasks: list[asyncio.Task[None]] = []
        self.clients: list[redis.asyncio.Redis] = []

    def publish(
        self, url: str, replica: Replica, replica_id: str = "r1", lease_s: float = LEASE_S
    ) -> Publisher:
        self.clients.append(connect(url))
        publisher = Publisher(
            self.clients[-1],
            self.name,
            replica_id,
            lease_s=lease_s,
            report_s=REPORT_S,
            residency=lambda: list(replica.held.values()),
            report=lambda: replica.load,
            applied=lambda: replica.applied,
            alive=lambda: replica.alive,
        )
        self.tasks.append(asyncio.create_task(publisher.run()))
        return publisher

    async def follow(
        self, url: str, silence_s: float = 0.2, clock: Callable[[], float] = time.monotonic
    ) -> FleetView:
        view = FleetView(url, self.name, base_name="base", silence_s=silence_s, clock=clock)
        self.tasks.append(asyncio.create_task(view.run()))
        await until(lambda: view.connected)
        return view

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        waited = asyncio.wait(self.tasks, timeout=TIMEOUT_S) if self.tasks else None
        _, pending = await waited if waited is not None else ((), ())
        assert not pending, "a cancellation was lost"
        for client in self.clients:
            await client.aclose()


@pytest.fixture
async def running(fleet: str) -> AsyncIterator[Fleet]:
    running = Fleet(fleet)
    yield running
    await running.close()


async def keys(url: str, fleet: str) -> set[str]:
    """Keys of replicas, without those of the fleet."""
    async with connect(url) as client:
        root = prefix(fleet)
        found = {key.removeprefix(root) async for key in client.scan_iter(root + "*")}
    return {key for key in found if ":" in key and "state" not in key}


def gone(url: str, fleet: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return not await keys(url, fleet)

    return check


async def test_what_a_replica_holds_is_seen_as_it_changes(
    shared_redis: str, running: Fleet
) -> None:
    view = await running.follow(shared_redis)
    replica = Replica(load=LoadReport(running=3, step_s=0.5))
    replica.hold("d1")
    publisher = running.publish(shared_redis, replica)
    await until(lambda: "r1" in view.replicas)
    before = view.resyncs
    state = view.replicas["r1"]
    assert state.residency == replica.held
    assert (state.report, state.incarnation) == (replica.load, publisher.incarnation)

    replica.hold("d2", Tier.LOADING)
    replica.held["d1"] = AdapterState("d1", Tier.FAILED, 0, 2.0, "it broke")
    replica.tell(publisher)
    await until(lambda: view.replicas["r1"].residency == replica.held)
    del replica.held["d1"]
    replica.held["d2"] = AdapterState("d2", Tier.ABSENT, 0, 3.0)
    replica.tell(publisher)
    await until(lambda: view.replicas["r1"].residency == {})
    assert view.resyncs == before  # messages did it


async def test_load_reports_arrive_without_being_asked_for(
    shared_redis: str, running: Fleet
) -> None:
    view = await running.follow(shared_redis)
    replica = Replica()
    running.publish(shared_redis, replica)
    await until(lambda: "r1" in view.replicas)
    before = view.resyncs
    replica.load = LoadReport(waiting=7)
    await until(lambda: view.replicas["r1"].report.waiting == 7)
    assert view.resyncs == before


async def test_in_redis_lease_and_residency_run_out_together(
    shared_redis: str, running: Fleet
) -> None:
    replica = Replica()
    replica.hold("d1")
    publisher = running.publish(shared_redis, replica)
    name = publisher.incarnation
    await until(lambda: bool(publisher.published))
    async with connect(shared_redis) as client:
        root = prefix(running.name)
        for key in (f"{root}lease:{name}", f"{root}residency:{name}"):
            assert 0 < await client.pttl(key) <= LEASE_S * 1000
        record = await client.hgetall(f"{root}residency:{name}")
    entry = {"tier": "device", "bytes": 10, "since": 1.0, "reason": None}
    assert {digest: json.loads(text) for digest, text in record.items()} == {"d1": entry}


async def test_a_replica_that_leaves_in_order_is_gone_at_once(
    shared_redis: str, running: Fleet
) -> None:
    view = await running.follow(shared_redis)
    replica = Replica()
    replica.hold("d1")
    running.publish(shared_redis, replica, lease_s=3600.0)
    await until(lambda: "r1" in view.replicas)
    replica.alive = False
    await until(lambda: not view.replicas)  # an hour before its lease runs out
    assert await keys(shared_redis, running.name) == set()


async def test_a_killed_replica_is_gone_within_the_lease_time(
    shared_redis: str, running: Fleet
) -> None:
    clock = Clock()
    # On a busy machine Redis may take longer than 0.2 s to answer, and would be asked for all.
    view = await running.follow(shared_redis, TIMEOUT_S, clock)
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", LONELY, shared_redis, running.name, str(LEASE_S)],
        stdout=subprocess.PIPE,
    )
    try:
        await until(lambda: "lonely" in view.replicas)
        # Its lease, its residency and its mark.
        assert len(await keys(shared_redis, running.name)) == 3
        before = view.resyncs
    finally:
        child.kill()
        child.communicate()
    await until(gone(shared_redis, running.name))
    assert set(view.replicas) == {"lonely"}
    clock.now_s += LEASE_S
    assert not view.replicas
    assert view.resyncs == before  # it left by the clock, not by a look at Redis


async def test_of_two_incarnations_the_newer_counts(shared_redis: str, running: Fleet) -> None:
    view = await running.follow(shared_redis)
    before, after = Replica(), Replica()
    before.hold("old")
    after.hold("new")
    first = running.publish(shared_redis, before)
    await until(lambda: "r1" in view.replicas)
    second = running.publish(shared_redis, after)
    assert first.incarnation != second.incarnation
    await until(lambda: set(view.replicas["r1"].residency) == {"new"})
    for report in range(3):  # the older one goes on reporting and changes nothing
        before.load = LoadReport(running=report)
        before.hold(f"old-{report}")
        before.tell(first)
        await until(lambda n=report: f"old-{n}" in first.published)  # type: ignore[misc]
        assert set(view.replicas["r1"].residency) == {"new"}
    registry = Registry(running.clients[0], running.name)
    _, standing = await registry.standing()
    assert {r: lease.incarnation for r, (lease, _) in standing.items()} == {
        "r1": second.incarnation
    }


async def test_a_standing_has_what_failed_of_what_is_asked(
    shared_redis: str, running: Fleet
) -> None:
    replica = Replica()
    for digest in ("asked", "other"):
        replica.held[digest] = AdapterState(digest, Tier.FAILED, 0, 1.0, 'no "file"')
    replica.held["well"] = AdapterState("well", Tier.HOST, 0, 1.0, '"tier":"failed"')
    publisher = running.publish(shared_redis, replica)
    await until(lambda: len(publisher.published) == 3)
    registry = Registry(running.clients[0], running.name)
    _, standing = await registry.standing(["asked", "well", "unknown"])
    assert standing["r1"][1] == {"asked": 'no "file"'}


async def test_a_lost_message_is_noticed_at_the_next_report(
    shared_redis: str, running: Fleet
) -> None:
    view = await running.follow(shared_redis)
    replica = Replica()
    replica.hold("d1")
    publisher = running.publish(shared_redis, replica)
    await until(lambda: "r1" in view.replicas)
    before = view.resyncs
    async with connect(shared_redis) as client:
        root = prefix(running.name)
        entry = json.dumps({"tier": "host", "bytes": 5, "since": 2.0, "reason": None})
        await client.hset(f"{root}residency:{publisher.incarnation}", "d1", entry)
        await client.hincrby(f"{root}residency:state", "sequence", 1)
    await until(lambda: view.replicas["r1"].residency["d1"].tier is Tier.HOST)
    assert view.resyncs == before + 1


@pytest.mark.parametrize("lost", ["lease", "residency", "incarnations", "residency:state"])
async def test_a_replica_that_redis_forgot_says_everything_again(
    shared_redis: str, running: Fleet, lost: str
) -> None:
    view = await running.follow(shared_redis)
    replica = Replica()
    replica.hold("d1")
    replica.hold("d2")
    publisher = running.publish(shared_redis, replica)
    await until(lambda: "r1" in view.replicas)
    async with connect(shared_redis) as client:
        own = f":{publisher.incarnation}" if lost in ("lease", "residency") else ""
        assert await client.delete(f"{prefix(running.name)}{lost}{own}")
    await until(lambda: _complete(shared_redis, running.name, publisher.incarnation, replica))
    assert view.replicas["r1"].residency == replica.held


async def test_what_redis_says_of_a_replica_too_much_is_put_right(
    shared_redis: str, running: Fleet
) -> None:
    view, replica, publisher = await _seen(shared_redis, running)
    async with connect(shared_redis) as client:
        key = f"{prefix(running.name)}residency:{publisher.incarnation}"
        await client.hset(key, "never-held", await client.hget(key, "d1"))
    await until(lambda: _complete(shared_redis, running.name, publisher.incarnation, replica))
    assert view.replicas["r1"].residency == replica.held


async def test_an_older_state_with_as_many_entries_is_put_right(
    shared_redis: str, running: Fleet
) -> None:
    """A Redis restored from a snapshot, so quickly that no report failed meanwhile."""
    view, replica, publisher = await _seen(shared_redis, running)
    async with connect(shared_redis) as client:
        root = prefix(running.name)
        key = f"{root}residency:{publisher.incarnation}"
        async with client.pipeline(transaction=True) as older:
            older.hset(key, "older", await client.hget(key, "d1"))
            older.hdel(key, "d1")
            older.set(f"{root}mark:{publisher.incarnation}", "older", px=60_000)
            await older.execute()
    await until(lambda: _complete(shared_redis, running.name, publisher.incarnation, replica))
    assert view.replicas["r1"].residency == replica.held


async def _seen(url: str, running: Fleet) -> tuple[FleetView, Replica, Publisher]:
    """A view that has seen a replica with one adapter."""
    view = await running.follow(url)
    replica = Replica()
    replica.hold("d1")
    publisher = running.publish(url, replica)
    await until(lambda: "r1" in view.replicas)
    return view, replica, publisher


async def _complete(url: str, fleet: str, incarnation: str, replica: Replica) -> bool:
    async with connect(url) as client:
        _, _, live = await Registry(client, fleet).read()
    return any(
        lease.incarnation == incarnation and residency == replica.held
        for lease, _, residency in live
    )


async def test_random_changes_of_several_replicas_end_in_the_same_view(
    shared_redis: str, running: Fleet, seed: int
) -> None:
    draw = random.Random(seed)
    view = await running.follow(shared_redis)
    replicas = [Replica() for _ in range(3)]
    publishers = [running.publish(shared_redis, r, f"r{i}") for i, r in enumerate(replicas)]
    tiers = [tier for tier in Tier if tier is not Tier.ABSENT]
    for _ in range(200):
        who = draw.randrange(3)
        digest = draw.choice("abcdef")
        if draw.random() < 0.3:
            replicas[who].held.pop(digest, None)
        else:
            replicas[who].hold(digest, draw.choice(tiers), draw.randrange(100))
        replicas[who].tell(publishers[who])
        await asyncio.sleep(0)
    late = await running.follow(shared_redis)
    for seen in (view, late):
        await until(
            lambda seen=seen: all(  # type: ignore[misc]
                f"r{i}" in seen.replicas and seen.replicas[f"r{i}"].residency == replica.held
                for i, replica in enumerate(replicas)
            )
        )


async def test_junk_on_the_channel_disturbs_no_view(shared_redis: str, running: Fleet) -> None:
    view = await running.follow(shared_redis)
    replica = Replica()
    publisher = running.publish(shared_redis, replica)
    await until(lambda: "r1" in view.replicas)
    async with connect(shared_redis) as client:
        for junk in ("what is this", "[]", "{}", '{"epoch": "", "sequence": "x", "kind": 1}'):
            await client.publish(channel(client, running.name), junk)
        await client.sadd(prefix(running.name) + "incarnations", "x:1")
        await client.set(prefix(running.name) + "lease:x:1", "junk")
    replica.hold("d1")
    replica.tell(publisher)
    await until(lambda: "d1" in view.replicas["r1"].residency)


async def test_while_redis_is_away_the_view_stays_and_after_it_is_true_again(
    own_redis: RedisServer, running: Fleet
) -> None:
    clock = Clock()
    view = await running.follow(own_redis.url, clock=clock)
    staying, leaving = Replica(), Replica()
    staying.hold("d1")
    publisher = running.publish(own_redis.url, staying, "staying")
    running.publish(own_redis.url, leaving, "leaving")
    await until(lambda: len(view.replicas) == 2)
    own_redis.stop()
    await until(lambda: not view.connected)
    clock.now_s += 2 * LEASE_S
    assert set(view.replicas) == {"staying", "leaving"}
    leaving.alive = False
    staying.hold("d2")
    staying.tell(publisher)
    await until(running.tasks[-1].done)  # it leaves without a word: Redis is away
    await asyncio.sleep(LEASE_S)  # at least: then no lease is left in the Redis that returns
    own_redis.start()
    # Each has one lease time to report: a live replica stays in the view.
    await until(lambda: set(view.replicas["staying"].residency) == {"d1", "d2"})
    assert set(view.replicas) == {"staying", "leaving"}
    clock.now_s += 0.6 * LEASE_S
    await until(lambda: view.replicas["staying"].seen_s == clock.now_s)
    clock.now_s += 0.6 * LEASE_S
    assert set(view.replicas) == {"staying"}


async def test_a_killed_redis_is_filled_again_by_the_replicas(
    own_redis: RedisServer, running: Fleet
) -> None:
    view = await running.follow(own_redis.url)
    replica = Replica()
    replica.hold("d1")
    publisher = running.publish(own_redis.url, replica)
    await until(lambda: "r1" in view.replicas)
    assert own_redis.pid is not None
    os.kill(own_redis.pid, signal.SIGKILL)
    await until(lambda: not view.connected)
    await until(lambda: view.connected and "r1" in view.replicas)
    await until(lambda: _complete(own_redis.url, running.name, publisher.incarnation, replica))
    async with connect(own_redis.url) as client:
        await client.flushall()
    await until(lambda: _complete(own_redis.url, running.name, publisher.incarnation, replica))
    replica.hold("d2")
    replica.tell(publisher)
    await until(
        lambda: "r1" in view.replicas and set(view.replicas["r1"].residency) == {"d1", "d2"}
    )


async def test_a_hung_redis_empties_no_view(own_redis: RedisServer, running: Fleet) -> None:
    clock = Clock()
    view = await running.follow(own_redis.url, silence_s=0.1, clock=clock)
    running.publish(own_redis.url, Replica())
    await until(lambda: "r1" in view.replicas)
    assert own_redis.pid is not None
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        await until(lambda: not view.connected)
        clock.now_s += 2 * LEASE_S
        assert "r1" in view.replicas
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    await until(lambda: view.connected and "r1" in view.replicas)


async def test_names_come_with_the_view(shared_redis: str, running: Fleet) -> None:
    found(shared_redis, running.name)
    view = await running.follow(shared_redis)
    async with connect(shared_redis) as client:
        await Catalog(client, running.name, "base").put(Version("a", "d1", "/a", 8, 100))
    await until(lambda: view.digest_of("a") == "d1")
    assert view.digest_of("base") is None and view.digest_of("unknown") is None
