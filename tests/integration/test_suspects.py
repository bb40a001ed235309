"""What one replica learns of a request that ended its engine, every replica knows."""

import asyncio

from cluster.redis_client import connect, prefix
from cluster.redis_server import RedisServer
from replica.serving.shared_suspects import SharedSuspects
from tests.until import until


async def test_two_deaths_on_two_replicas_refuse_the_request_on_a_third(
    shared_redis: str, fleet: str
) -> None:
    one, two, three = (SharedSuspects(connect(shared_redis), fleet) for _ in range(3))
    running = [asyncio.create_task(each.run()) for each in (one, two, three)]
    assert [await one.died("a", "death") for _ in range(2)] == [1, 1]
    assert not one.poisoned("a")
    await until(lambda: three.any)
    assert not three.poisoned("a")
    assert await two.died("a", "another") == 2
    await until(lambda: three.poisoned("a"))
    assert not three.poisoned("b")
    async with connect(shared_redis) as redis:
        assert 500 < await redis.ttl(f"{prefix(fleet)}deaths:a") <= 600
    await three.cleared("a")
    assert not three.any
    await until(lambda: not two._counts)
    assert await three.died("a", "last") == 1
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_without_redis_each_replica_counts_for_itself(
    own_redis: RedisServer, fleet: str
) -> None:
    async with connect(own_redis.url) as redis:
        suspects = SharedSuspects(redis, fleet)
        own_redis.stop()
        assert [await suspects.died("a", death) for death in "bc"] == [1, 2]
        assert suspects.poisoned("a")
