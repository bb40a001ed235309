"""Routers that pick count each other."""

import asyncio
import time

from cluster.redis_client import connect
from router.peers import Peers
from tests.until import until


async def test_routers_that_pick_count_each_other_and_idle_ones_do_not(
    shared_redis: str, fleet: str
) -> None:
    routers = [Peers(connect(shared_redis), fleet) for _ in range(3)]
    tasks = [asyncio.create_task(router.run()) for router in routers]
    for router in routers[:2]:
        router.picked(time.monotonic() + 3600)  # it goes on
    await until(lambda: [router.count for router in routers] == [2, 2, 2])
    tasks[0].cancel()
    await until(lambda: routers[1].count == 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
