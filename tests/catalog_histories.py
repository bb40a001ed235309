"""Random histories of a fleet's catalog: changes, and Redis and replicas that fail.

The rule that each history is held to: a change that was acknowledged stays, or gives way to a later
one, while a replica that acknowledged it lives. A replica acknowledges a change when its copy has
it. Removals are changes too.

    python -m tests.catalog_histories --seeds 500
"""

import argparse
import asyncio
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from cluster.catalog import Catalog
from cluster.errors import BadRequest, CatalogUnavailable, ModelNotFound
from cluster.recovery import Stamp, decode_record
from cluster.values import Version
from tests.fake_catalog import FakeClient, FakeServer, Saved

LEASE_MS = 1000
REPLICAS = 3
NAMES = "abcde"
STEPS = 250


@dataclass(frozen=True, slots=True)
class Write:
    """index: the order in which Redis took the writes. digest: None: a removal."""

    index: int
    name: str
    digest: str | None


@dataclass
class Process:
    """A replica, or with `replica` False a router. stale: it has lost its connection since its last
    look. looked_ms: when it looked last. acknowledged: by name, the latest write that it has had.
    """

    client: FakeClient
    catalog: Catalog
    replica: bool
    stale: bool = True
    looked_ms: int = 0
    acknowledged: dict[str, Write] = field(default_factory=dict)


class History:
    """One seeded life of a fleet. `run` raises AssertionError if the rule is broken."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.server = FakeServer()
        self.writes: dict[Stamp, Write] = {}
        self.saved: list[Saved] = [self.server.save()]
        self.processes = [self._start(replica=True) for _ in range(REPLICAS)]
        self.processes.append(self._start(replica=False))
        self.servers = 1
        self.lost = 0  # writes that no living replica had acknowledged

    def _start(self, replica: bool) -> Process:
        client = FakeClient(self.server)
        lease_s = LEASE_MS / 1000 if replica else None
        return Process(client, Catalog(cast(Any, client), "f", "base", lease_s=lease_s), replica)

    async def run(self) -> None:
        for _ in range(STEPS):
            await self._step()
        await self._end()

    async def _step(self) -> None:
        kinds = ["write"] * 60 + ["deliver"] * 30 + ["wait"] * 30 + ["look"] * 10 + ["save"] * 5
        kinds += ["partition", "heal", "heal", "kill", "flush", "rollback", "evict", "restart"]
        await getattr(self, f"_{self.draw.choice(kinds)}")()
        for process in self.processes:
            self._note(process)

    async def _write(self) -> None:
        process = self.draw.choice([p for p in self.processes if p.replica])
        name, load_inplace = self.draw.choice(NAMES), self.draw.random() < 0.5
        digest = None if self.draw.random() < 0.3 else f"d{len(self.writes)}"
        before = self._latest_acknowledged(name, connected=True)
        there = self._in_redis(name)
        try:
            if digest is None:
                stamp, _ = await process.catalog.remove(name)
            else:
                version = Version(name, digest, "/a", 8, 100)
                stamp, _ = await process.catalog.put(version, load_inplace=load_inplace)
        except (CatalogUnavailable, BadRequest, ModelNotFound):
            return
        assert stamp not in self.writes, f"two writes have the stamp {stamp}"
        self.writes[stamp] = Write(len(self.writes), name, digest)
        if not load_inplace and digest is not None and before is not None:
            known = max((before, there or before), key=lambda write: write.index)
            assert known.digest is None, f"{known} was replaced without leave, at {stamp}"

    async def _deliver(self) -> None:
        """Some messages arrive, in order."""
        process = self.draw.choice(self.processes)
        for _ in range(self.draw.randint(0, len(process.client.inbox))):
            await self._deliver_one(process)

    async def _deliver_one(self, process: Process) -> None:
        message = json.loads(process.client.inbox.pop(0))
        if not process.stale and not process.catalog._apply(message):
            await self._look_of(process)

    async def _wait(self, most_ms: int = LEASE_MS) -> None:
        """Time passes. Nobody who can reach Redis is silent for more than a quarter of a lease."""
        left_ms = self.draw.randint(1, most_ms)
        while left_ms > 0:
            passed_ms = min(left_ms, LEASE_MS // 8)
            self.server.now_ms += passed_ms
            left_ms -= passed_ms
            for process in self.draw.sample(self.processes, len(self.processes)):
                silent_ms = self.server.now_ms - process.looked_ms
                if silent_ms >= LEASE_MS // 4 or self.draw.random() < 0.3:
                    await self._renew(process)

    async def _renew(self, process: Process) -> None:
        """As the publisher's renewals do: it looks if Redis is not as its copy."""
        server, catalog = self.server, process.catalog
        same = server.settled and (server.generation, server.sequence) == catalog.stamp
        due = catalog.settles_in_s is not None and catalog.settles_in_s * 1000 <= (
            server.now_ms - process.looked_ms
        )
        waits = catalog.settles_in_s is not None and not server.settled
        if process.stale or due or not (same or waits):
            await self._look_of(process)

    async def _look(self) -> None:
        await self._look_of(self.draw.choice(self.processes))

    async def _look_of(self, process: Process) -> None:
        process.stale = True
        try:
            await process.catalog.resync()
        except CatalogUnavailable:
            return
        process.stale = False
        process.looked_ms = self.server.now_ms

    async def _save(self) -> None:
        self.saved.append(self.server.save())

    async def _partition(self) -> None:
        process = self.draw.choice(self.processes)
        if not process.client.away:
            process.client.leave()
            process.stale = True

    async def _heal(self) -> None:
        for process in self.processes:
            if process.client.away and self.draw.random() < 0.5:
                process.client.join()

    async def _kill(self) -> None:
        position = self.draw.randrange(len(self.processes))
        old = self.processes[position]
        if not old.client.away:
            old.client.leave()
        self.processes[position] = self._start(old.replica)

    async def _flush(self) -> None:
        self.server.restore(({}, {}))

    async def _rollback(self) -> None:
        """A snapshot is restored, or a server that lags behind takes over."""
        self.server.restore(self.draw.choice(self.saved[-4:]))
        await self._restart()

    async def _evict(self) -> None:
        self.draw.choice((self.server.catalog, self.server.state)).clear()

    async def _restart(self) -> None:
        self.servers += 1
        self.server.name = f"server{self.servers}"
        for process in self.processes:
            process.client.inbox.clear()
            process.stale = True

    async def _end(self) -> None:
        """No more faults: after a few leases all agree, and the rule holds."""
        for process in self.processes:
            if process.client.away:
                process.client.join()
        for _ in range(12):
            await self._wait(LEASE_MS)
            for process in self.processes:
                while process.client.inbox:
                    await self._deliver_one(process)
                self._note(process)
        assert self.server.settled, "Redis never settled"
        books = [process.catalog.book.by_name() for process in self.processes]
        assert all(book == books[0] for book in books), f"copies differ: {books}"
        found = {name: self._in_redis(name) for name in NAMES}
        held = {v.name: v.digest for v in books[0]}
        assert held == {n: w.digest for n, w in found.items() if w and w.digest}
        for name in NAMES:
            required = self._latest_acknowledged(name)
            there = found[name]
            if required is not None:
                assert there is not None, f"{required} is lost"
                assert there.index >= required.index, f"{required} is lost, there is {there}"
        self.lost = sum(self._is_lost(write, found[write.name]) for write in self.writes.values())

    def _is_lost(self, write: Write, there: Write | None) -> bool:
        return there is None or there.index < write.index

    def _note(self, process: Process) -> None:
        """Notes what the copy has; it never goes back."""
        for name in NAMES:
            record = process.catalog._records.get(name)
            if record is None or not process.replica:
                continue
            write, before = self.writes[record.stamp], process.acknowledged.get(name)
            assert before is None or before.index <= write.index, f"{before} gave way to {write}"
            process.acknowledged[name] = write

    def _latest_acknowledged(self, name: str, *, connected: bool = False) -> Write | None:
        """By a living replica; connected: by one that looked at Redis after its last fault."""
        writes: Iterator[Write] = (
            process.acknowledged[name]
            for process in self.processes
            if name in process.acknowledged
            and not (connected and (process.client.away or process.stale))
        )
        return max(writes, key=lambda write: write.index, default=None)

    def _in_redis(self, name: str) -> Write | None:
        text = self.server.catalog.get(name)
        return self.writes[decode_record(text).stamp] if text else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    failed = writes = lost = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        history = History(seed)
        try:
            asyncio.run(history.run())
        except AssertionError as error:
            failed += 1
            print(f"seed {seed}: {error}")
        writes += len(history.writes)
        lost += history.lost
    print(
        f"{arguments.seeds} histories, {writes} writes, {lost} lost that no living replica had, "
        f"{failed} failed"
    )
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
