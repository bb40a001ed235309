"""The catalog in a real Redis: atomic changes, complete copies, and a Redis that is away."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest
import redis.asyncio

from cluster import redis_client
from cluster.catalog import Catalog, channel, found
from cluster.errors import BadRequest, CatalogUnavailable, ModelNotFound
from cluster.recovery import encode_version
from cluster.redis_client import connect, prefix
from cluster.redis_server import RedisServer
from cluster.values import Version
from tests.until import TIMEOUT_S, until

Open = Callable[..., Awaitable[Catalog]]
Result = TypeVar("Result")


LEASE_S = 0.2


def version(name: str, digest: str = "d1") -> Version:
    return Version(name, digest, f"/adapters/{name}", 8, 100)


def record(version: Version, generation: int = 1, sequence: int = 1) -> str:
    stamp = f"[{generation},{sequence}]"
    return f'{{"stamp":{stamp},"run":"","version":{encode_version(version)}}}'


async def settled(change: Callable[[], Awaitable[Result]]) -> Result:
    """The change, once the replicas had their lease to write back."""
    outcome: list[Result] = []

    async def changed() -> bool:
        with contextlib.suppress(CatalogUnavailable):
            outcome.append(await change())
        return bool(outcome)

    await until(changed)
    return outcome[0]


@pytest.fixture
async def follow(fleet: str) -> AsyncIterator[Open]:
    """Opens catalogs that stay up to date until the test ends."""
    tasks: list[asyncio.Task[None]] = []
    clients: list[redis.asyncio.Redis] = []

    async def open_one(url: str, *, replica: bool = True) -> Catalog:
        if not clients:
            found(url, fleet)
        client = connect(url)
        catalog = Catalog(client, fleet, "base", lease_s=LEASE_S if replica else None)
        clients.append(client)
        tasks.append(asyncio.create_task(catalog.run()))
        await until(lambda: catalog.connected)
        return catalog

    yield open_one
    for task in tasks:
        task.cancel()
    _, pending = await asyncio.wait(tasks, timeout=TIMEOUT_S)
    assert not pending, "a cancellation was lost"
    for client in clients:
        await client.aclose()


async def test_a_change_reaches_every_copy(shared_redis: str, follow: Open) -> None:
    one, other = await follow(shared_redis), await follow(shared_redis)
    (_, sequence), changed = await one.put(version("a"))
    assert (sequence, changed) == (1, True)
    await until(lambda: other.book.get("a") == version("a") and one.book.sequence == 1)
    (_, sequence), digest = await other.remove("a")
    assert (sequence, digest) == (2, "d1")
    await until(lambda: one.book.get("a") is None and one.book.sequence == 2)


async def test_a_copy_that_starts_late_has_the_whole_book(shared_redis: str, follow: Open) -> None:
    one = await follow(shared_redis)
    await one.put(version("a"))
    await one.put(version("b"))
    late = await follow(shared_redis)
    assert late.book.by_name() == [version("a"), version("b")]
    assert late.book.sequence == 2


async def test_what_is_refused_changes_nothing(shared_redis: str, follow: Open) -> None:
    one, other = await follow(shared_redis), await follow(shared_redis)
    await one.put(version("a"))
    for refused in (version("a", "d2"), version("base"), version("")):
        with pytest.raises(BadRequest) as caught:
            await other.put(refused)
        assert caught.value.field == "lora_name"
    with pytest.raises(ModelNotFound):
        await other.remove("b")
    assert await other.read() == (1, [version("a")])


async def test_a_name_is_re_pointed_in_place(shared_redis: str, follow: Open) -> None:
    one, other = await follow(shared_redis), await follow(shared_redis)
    await one.put(version("a", "d1"))
    (_, sequence), changed = await one.put(version("a", "d2"), load_inplace=True)
    assert (sequence, changed) == (2, True)
    await until(lambda: other.book.get("a") == version("a", "d2"))
    (_, sequence), changed = await one.put(version("a", "d2"), load_inplace=True)
    assert (sequence, changed) == (2, False)


async def test_the_same_name_and_digest_again_is_success(shared_redis: str, follow: Open) -> None:
    one, other = await follow(shared_redis), await follow(shared_redis)
    first = await one.put(version("a"))
    assert await other.put(version("a")) == (first[0], False)
    copy = dataclasses.replace(version("a"), uri="/copy")
    assert (await other.put(copy))[1] is True
    for changed in (version("a", "d2"), dataclasses.replace(version("a"), pinned=True)):
        with pytest.raises(BadRequest, match="'a' is already loaded"):
            await other.put(changed)
    assert (await one.read())[1] == [copy]


async def test_of_many_all_change_or_none(shared_redis: str, follow: Open) -> None:
    one, other = await follow(shared_redis), await follow(shared_redis)
    await one.put(version("b", "d2"))
    with pytest.raises(BadRequest, match="'b' is already loaded"):
        await one.put_all([version("a"), version("b"), version("c")])
    assert await one.read() == (1, [version("b", "d2")])
    (_, sequence), _ = await one.put_all([version("a"), version("b", "d2"), version("c")])
    assert sequence == 2
    await until(lambda: [v.name for v in other.book.by_name()] == ["a", "b", "c"])
    assert other.book.sequence == 2


async def test_writers_at_once_lose_nothing_and_skip_no_number(
    shared_redis: str, follow: Open
) -> None:
    writers = [await follow(shared_redis) for _ in range(4)]

    async def write(index: int) -> list[int]:
        # One after the other: on a busy machine, a hundred connections at once take too long.
        puts = [await writers[index].put(version(f"{index}-{n}")) for n in range(25)]
        return [sequence for (_, sequence), _ in puts]

    written = await asyncio.gather(*map(write, range(len(writers))))
    sequences = [sequence for each in written for sequence in each]
    assert sorted(sequences) == list(range(1, 101))
    await until(lambda: all(len(writer.book.by_name()) == 100 for writer in writers))
    assert all(writer.book.by_name() == writers[0].book.by_name() for writer in writers)


async def test_of_writers_of_one_name_one_wins(shared_redis: str, follow: Open) -> None:
    writers = [await follow(shared_redis) for _ in range(4)]
    changes = (writer.put(version("a", f"d{i}")) for i, writer in enumerate(writers))
    outcomes = await asyncio.gather(*changes, return_exceptions=True)
    winners = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, tuple)]
    assert len(winners) == 1
    assert sum(isinstance(outcome, BadRequest) for outcome in outcomes) == 3
    assert await writers[0].read() == (1, [version("a", f"d{winners[0]}")])


async def test_random_changes_by_several_writers_end_in_one_book(
    shared_redis: str, follow: Open, seed: int
) -> None:
    draw = random.Random(seed)
    writers = [await follow(shared_redis) for _ in range(3)]

    async def change(writer: Catalog) -> None:
        for _ in range(60):
            name = draw.choice("abcde")
            if draw.random() < 0.3:
                with contextlib.suppress(ModelNotFound):
                    await writer.remove(name)
            else:
                await writer.put(version(name, draw.choice("xyz")), load_inplace=True)

    await asyncio.gather(*(change(writer) for writer in writers))
    sequence, versions = await writers[0].read()
    await until(lambda: all(writer.book.sequence == sequence for writer in writers))
    assert all(writer.book.by_name() == versions for writer in writers)


async def test_looks_while_changes_arrive_take_nothing_for_lost(
    shared_redis: str, follow: Open
) -> None:
    writer, looking = await follow(shared_redis), await follow(shared_redis)
    router = await follow(shared_redis, replica=False)
    generation = writer.stamp[0]
    done = asyncio.Event()

    async def look(catalog: Catalog) -> None:
        before = catalog.stamp
        while not done.is_set():
            await catalog.resync()
            assert catalog.stamp >= before and catalog.settles_in_s is None
            before = catalog.stamp

    looks = [asyncio.create_task(look(c)) for c in (looking, looking, router)]
    for number in range(200):
        await writer.put(version(f"a{number}"))
    done.set()
    await asyncio.gather(*looks)
    await until(lambda: looking.stamp == router.stamp == writer.stamp == (generation, 200))


async def test_a_gap_in_the_sequence_brings_a_new_snapshot(
    shared_redis: str, follow: Open, fleet: str
) -> None:
    one, other = await follow(shared_redis), await follow(shared_redis)
    await one.put(version("a"))
    async with connect(shared_redis) as client:  # a change whose message is lost
        root = prefix(fleet)
        generation, sequence = one.stamp
        text = record(version("lost"), generation, sequence + 1)
        await client.hset(root + "catalog", "lost", text)
        await client.hincrby(root + "catalog:state", "sequence", 1)
        await client.hincrby(root + "catalog:state", "count", 1)
    assert other.book.get("lost") is None
    await one.put(version("b"))
    names = ["a", "b", "lost"]
    await until(lambda: [v.name for v in other.book.by_name()] == names)
    assert other.book.sequence == 3


async def test_a_name_whose_message_was_lost_is_found_by_asking(
    shared_redis: str, follow: Open, fleet: str
) -> None:
    one = await follow(shared_redis)
    async with connect(shared_redis) as client:
        await client.hset(prefix(fleet) + "catalog", "lost", record(version("lost")))
    assert await one.lookup("lost") == version("lost")
    assert await one.lookup("nobody") is None


async def test_a_flood_of_unknown_names_asks_redis_a_handful_of_times(
    own_redis: RedisServer, follow: Open
) -> None:
    one = await follow(own_redis.url)
    names = [f"unknown-{n % 500}" for n in range(1000)]
    assert await asyncio.gather(*(one.lookup(name) for name in names)) == [None] * 1000
    async with connect(own_redis.url) as client:
        statistics = await client.info("commandstats")
    assert statistics["cmdstat_hmget"]["calls"] <= 4


async def test_a_lookup_that_is_given_up_takes_no_one_with_it(
    shared_redis: str, follow: Open
) -> None:
    one = await follow(shared_redis)
    await one.put(version("a"))
    given_up = asyncio.create_task(one.lookup("a"))
    kept = asyncio.create_task(one.lookup("a"))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await kept == version("a")


async def test_the_flags_of_one_run_apply_once(shared_redis: str, follow: Open) -> None:
    one = await follow(shared_redis)
    (_, sequence), changed = await one.put(version("a", "flags"), run="run-1")
    assert (sequence, changed) == (1, True)
    await one.put(version("a", "api"), load_inplace=True)
    assert (await one.put(version("a", "flags"), run="run-1"))[1] is False
    assert (await one.read())[1] == [version("a", "api")]
    assert (await one.put(version("a", "flags"), run="run-2"))[1] is True
    assert (await one.read())[1] == [version("a", "flags")]


@pytest.mark.parametrize("junk", ["what is this", "[]", '{"stamp": 1}', '{"name": "a"}'])
async def test_junk_in_redis_is_ignored_and_copies_live(
    shared_redis: str, follow: Open, fleet: str, junk: str
) -> None:
    one = await follow(shared_redis)
    await one.put(version("a"))
    async with connect(shared_redis) as client:
        await client.publish(channel(client, fleet), junk)
        await client.hset(prefix(fleet) + "catalog", "junk", junk)
    await settled(lambda: one.put(version("b")))  # Redis has one record more than its state says
    late = await follow(shared_redis)
    await until(lambda: one.book.sequence == 2)
    assert [v.name for v in one.book.by_name()] == ["a", "b"]
    assert [v.name for v in late.book.by_name()] == ["a", "b"]
    assert await one.lookup("junk") is None


async def test_without_redis_readers_go_on_and_writers_hear_soon(
    own_redis: RedisServer, follow: Open
) -> None:
    one = await follow(own_redis.url)
    await one.put(version("a"))
    await until(lambda: one.book.sequence == 1)
    own_redis.stop()
    for attempt in (one.put(version("b")), one.remove("a"), one.lookup("c"), one.read()):
        with pytest.raises(CatalogUnavailable):
            await attempt
    await until(lambda: not one.connected)
    assert one.book.by_name() == [version("a")]
    own_redis.start()
    await until(lambda: one.connected)
    (_, sequence), changed = await settled(lambda: one.put(version("b")))
    assert (sequence, changed) == (2, True)
    await until(lambda: one.book.sequence == 2)


async def test_a_killed_redis_loses_no_adapter(own_redis: RedisServer, follow: Open) -> None:
    one, other = await follow(own_redis.url), await follow(own_redis.url)
    for n in range(20):
        await one.put(version(f"a{n}"))
    pid = own_redis.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not one.connected and not other.connected)
    await until(lambda: one.connected and other.connected)
    await settled(lambda: one.put(version("b")))
    await until(lambda: other.book.sequence == 21)
    assert len(other.book.by_name()) == 21


async def test_a_hung_redis_is_noticed_and_no_one_hangs_with_it(
    own_redis: RedisServer, follow: Open
) -> None:
    one = await follow(own_redis.url)
    assert own_redis.pid is not None
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        with pytest.raises(CatalogUnavailable):
            await one.put(version("a"))
        await until(lambda: not one.connected)
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    await until(lambda: one.connected)


async def test_a_reply_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "CALL_TIMEOUT_S", 0.01)
    with pytest.raises(CatalogUnavailable):
        await redis_client.call(asyncio.Event().wait())


async def test_a_replica_writes_a_lost_catalog_back(own_redis: RedisServer, follow: Open) -> None:
    replica = await follow(own_redis.url)
    router = await follow(own_redis.url, replica=False)
    await replica.put(version("a"))
    await replica.put(version("b"))
    await until(lambda: replica.book.sequence == 2 and router.book.sequence == 2)
    async with connect(own_redis.url) as client:
        await client.flushall()
    (_, sequence), changed = await settled(lambda: replica.put(version("c")))
    assert changed and sequence > 2
    assert [v.name for v in (await router.read())[1]] == ["a", "b", "c"]
    await until(lambda: router.book.sequence == sequence == replica.book.sequence)
    assert [v.name for v in router.book.by_name()] == ["a", "b", "c"]


async def test_two_replicas_that_write_it_back_at_once_agree(
    own_redis: RedisServer, follow: Open
) -> None:
    one, other = await follow(own_redis.url), await follow(own_redis.url)
    await one.put(version("a"))
    await until(lambda: one.book.sequence == 1 and other.book.sequence == 1)
    async with connect(own_redis.url) as client:
        await client.flushall()
    await asyncio.gather(one.resync(), other.resync())
    assert (await one.read())[1] == [version("a")]
    await until(lambda: one.settles_in_s is None and other.settles_in_s is None)
    await until(lambda: one.stamp == other.stamp)
    assert one.book.by_name() == other.book.by_name() == [version("a")]


async def test_an_error_never_shows_the_password() -> None:
    async with connect("redis://:very-secret@127.0.0.1:1/0") as client:
        with pytest.raises(CatalogUnavailable) as caught:
            await Catalog(client, "f", "base", lease_s=1.0).put(version("a"))
    assert "very-secret" not in json.dumps([caught.value.message, repr(caught.value.__cause__)])


async def test_a_start_forgets_what_earlier_flags_set_and_its_own_do_not(
    shared_redis: str, fleet: str
) -> None:
    found(shared_redis, fleet)
    async with connect(shared_redis) as client:
        first = Catalog(client, fleet, "base", lease_s=LEASE_S)
        await first.resync()
        await first.put_all([version("dropped"), version("kept")], run="one")
        await first.put(version("added"))
        await first.put(version("dropped", "d2"), load_inplace=True)
        found(shared_redis, fleet)
        assert len((await first.read())[1]) == 3
        found(shared_redis, fleet, configured=["kept", "new"])
        again = Catalog(client, fleet, "base", lease_s=LEASE_S)
        await again.resync()
        assert [v.name for v in again.book.by_name()] == ["added", "kept"]
        assert again.settles_in_s is None


async def test_fleets_of_two_names_share_a_redis(shared_redis: str, fleet: str) -> None:
    async with connect(shared_redis) as client:
        names = (fleet + "-1", fleet + "-2")
        for name in names:
            found(shared_redis, name)
        one, other = (Catalog(client, name, "base") for name in names)
        await one.put(version("a"))
        assert await other.read() == (0, [])
