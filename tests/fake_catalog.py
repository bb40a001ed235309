"""The part of Redis that the catalog uses, in memory: its scripts in Python, faults on request.

`tests/integration/test_catalog_scripts.py` holds it to what the real scripts do.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from cluster.catalog_scripts import (
    BEGIN,
    FORGET,
    FOUND,
    MERGE,
    PUT,
    REMOVE,
    RETRY,
    SETTLE,
    SNAPSHOT,
)

Saved = tuple[dict[str, str], dict[str, str]]


@dataclass
class FakeServer:
    """state, catalog: the two hashes. now_ms: its clock."""

    name: str = "server1"
    now_ms: int = 1_000_000
    state: dict[str, str] = field(default_factory=dict)
    catalog: dict[str, str] = field(default_factory=dict)
    inboxes: list[list[str]] = field(default_factory=list)

    def save(self) -> Saved:
        return dict(self.state), dict(self.catalog)

    def restore(self, saved: Saved) -> None:
        self.state, self.catalog = dict(saved[0]), dict(saved[1])

    def script(self, text: str, args: list[Any]) -> Any:
        run: dict[str, Callable[[list[str]], Any]] = {
            BEGIN: self._begin,
            FORGET: self._forget,
            FOUND: self._found,
            MERGE: self._merge,
            PUT: self._put,
            REMOVE: self._remove,
            RETRY: self._retry,
            SETTLE: self._settle,
            SNAPSHOT: self._snapshot,
        }
        return run[text]([str(arg) for arg in args])

    @property
    def generation(self) -> int:
        return int(self.state.get("generation", 0))

    @property
    def sequence(self) -> int:
        return int(self.state.get("sequence", 0))

    @property
    def settled(self) -> bool:
        return (
            self.generation > 0
            and "settling" not in self.state
            and self.state.get("settled_by") == self.name
            and int(self.state.get("count", -1)) == len(self.catalog)
        )

    def _publish(
        self, generation: int, sequence: int, records: dict[str, str], **more: Any
    ) -> None:
        message = {"generation": generation, "sequence": sequence, "records": records, **more}
        for inbox in self.inboxes:
            inbox.append(json.dumps(message))

    def _commit(self, records: dict[str, str]) -> str:
        sequence = self.sequence + 1
        self.state["sequence"], self.state["count"] = str(sequence), str(len(self.catalog))
        self._publish(self.generation, sequence, records)
        return str(sequence)

    def _fenced(self, generation: str, sequence: str) -> bool:
        known = self.generation == int(generation) and self.sequence >= int(sequence)
        return not (self.settled and known)

    def _record(self, run: str, version: str) -> str:
        stamp = f"[{self.generation},{self.sequence + 1}]"
        return f'{{"stamp":{stamp},"run":{json.dumps(run)},"version":{version}}}'

    def _current(self, name: str) -> dict[str, Any]:
        return _decoded(self.catalog.get(name, ""))

    def _put(self, args: list[str]) -> list[str]:
        _, generation, sequence, inplace, run, *pairs = args
        if self._fenced(generation, sequence):
            return ["unsettled", ""]
        changes: dict[str, str] = {}
        for name, version in zip(pairs[::2], pairs[1::2], strict=True):
            current, after = self._current(name), json.loads(version)
            before = current["version"]
            same_fields = ("digest", "pinned", "weight")
            alike = before is not None and all(before[f] == after[f] for f in same_fields)
            same = alike and before["uri"] == after["uri"]
            if run:
                same = current.get("run") == run
            elif before is not None and not alike and inplace != "1":
                return ["taken", name]
            if not same:
                changes[name] = self._record(run or current.get("run") or "", version)
        if not changes:
            return ["same", str(self.sequence)]
        self.catalog |= changes
        return ["put", self._commit(changes)]

    def _remove(self, args: list[str]) -> list[str]:
        _, generation, sequence, name = args
        if self._fenced(generation, sequence):
            return ["unsettled", ""]
        current = self._current(name)
        if current["version"] is None:
            return ["absent", ""]
        before = self.catalog[name]
        self.catalog[name] = self._record(current.get("run") or "", "null")
        return [before, self._commit({name: self.catalog[name]})]

    def _retry(self, args: list[str]) -> list[str]:
        _, generation, sequence, digests = args
        if self._fenced(generation, sequence):
            return ["unsettled", ""]
        self.state["sequence"] = str(self.sequence + 1)
        self._publish(self.generation, self.sequence, {}, again=json.loads(digests))
        return ["put", str(self.sequence)]

    def _merge(self, args: list[str]) -> None:
        settled, latest = self.settled, self.sequence
        records: dict[str, str] = {}
        for name, record in zip(args[1::2], args[2::2], strict=True):
            stamp = _decoded(record)["stamp"]
            if self._current(name)["stamp"] < stamp:
                self.catalog[name] = records[name] = record
                latest = max(latest, stamp[1])
        if not settled:
            self.state["sequence"] = str(latest)
        elif records:
            self._commit(records)

    def _begin(self, args: list[str]) -> None:
        if self.state.get("settling", "") == args[1]:
            self.state["settling"] = f"{self.name}:{self.now_ms}"
            self._publish(0, 0, {})

    def _settle(self, args: list[str]) -> None:
        settling = self.state.get("settling")
        server, _, since_ms = (settling or "").partition(":")
        if settling != args[1] or server != self.name:
            return
        if self.now_ms - int(since_ms) < int(args[2]):
            return
        self._settle_at(int(args[3]), int(args[4]))
        self._publish(self.generation, self.sequence, {})

    def _settle_at(self, generation: int, sequence: int) -> None:
        self.state["generation"] = str(max(self.now_ms, self.generation + 1, generation + 1))
        self.state["sequence"] = str(max(self.sequence, sequence))
        self.state |= {"count": str(len(self.catalog)), "settled_by": self.name}
        self.state.pop("settling", None)

    def _found(self, args: list[str]) -> None:
        if not self.settled:
            self._settle_at(0, 0)

    def _forget(self, args: list[str]) -> None:
        if not self.settled:
            return
        forgotten = False
        for name, record in zip(args[1::2], args[2::2], strict=True):
            if self.catalog.get(name) == record:
                del self.catalog[name]
                forgotten = True
        if forgotten:
            self._commit({})

    def _snapshot(self, args: list[str]) -> list[Any]:
        names = ("generation", "sequence", "count", "settled_by", "settling")
        head = [self.state.get(name) for name in names]
        items = [part for pair in self.catalog.items() for part in pair]
        return [*head, self.name, len(self.catalog), str(self.now_ms), items]


class FakeClient:
    """One process's connection. While `away`, it raises what redis-py raises.

    inbox: messages that have come. They are lost while the process is away.
    """

    connection_pool = SimpleNamespace(connection_kwargs={})

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.inbox: list[str] = []
        self.away = False
        server.inboxes.append(self.inbox)

    def register_script(self, text: str) -> Callable[..., Awaitable[Any]]:
        async def run(keys: list[str], args: list[Any]) -> Any:
            self._check()
            return self.server.script(text, args)

        return run

    async def hmget(self, key: str, names: list[str]) -> list[str | None]:
        self._check()
        return [self.server.catalog.get(name) for name in names]

    def leave(self) -> None:
        self.away = True
        self.inbox.clear()
        inboxes = self.server.inboxes
        inboxes[:] = [inbox for inbox in inboxes if inbox is not self.inbox]

    def join(self) -> None:
        self.away = False
        self.server.inboxes.append(self.inbox)

    def _check(self) -> None:
        if self.away:
            raise RedisConnectionError("away")


def _decoded(record: str) -> dict[str, Any]:
    try:
        data = json.loads(record)
        if isinstance(data["stamp"], list):
            return dict(data)
    except (ValueError, KeyError, TypeError):
        pass
    return {"stamp": [0, 0], "run": "", "version": None}
