"""Runs the engine in its own process, so that Python threads of the server cannot slow its steps,
and starts it again when it ends or hangs.

    NEW ── start ──> SERVING ── ends, or is late and killed ──> RESTARTING ── started ──> SERVING
                                                                     └── STRIKES_MAX ──> DEAD

A request fails with EngineFailed when the engine ends under it. One that comes while the engine is
started again waits for it. The new engine gets the versions that the old one had, before any
request.
"""

import asyncio
import dataclasses
import secrets
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cluster.config import EngineConfig
from cluster.errors import EngineFailed, EngineGone, FleetError, ShuttingDown, StartupError
from cluster.values import AdapterState, LoadReport, Version
from replica.engine.child import EngineChild, Spare
from replica.engine.messages import (
    Cancel,
    Command,
    Forget,
    GetTimeline,
    Message,
    Register,
    Result,
    Submit,
)
from replica.engine.streams import Stream, deliver, fail
from replica.scheduling.request import Delta, NewRequest
from replica.scheduling.timeline import TimelineEvent

# The engine is given up after this many ends, none of which followed STEADY_S of service.
STRIKES_MAX = 3
STEADY_S = 60.0
# A start that takes this many times as long as the first one is a hang.
_START_TIMES = 10.0
_START_LEAST_S = 60.0
# Longest wait of a request for an engine that is started again.
_WAIT_S = 60.0
# A process that outlives SIGKILL for this long is stuck in the kernel, so it cannot be replaced.
_KILL_S = 15.0
_BACKOFF_S = 1.0
_WATCH_S = 0.25
# A late engine is killed at the second look, since this process may have been stopped with it.
_LATE_LOOKS = 2
# An engine that will be late this soon may hang: the next process is started beside it, since its
# imports take a second or more.
_SPARE_S = 2.0


class Phase(Enum):
    NEW = "new"
    SERVING = "serving"
    RESTARTING = "restarting"
    DEAD = "dead"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class _Call:
    command: Command
    future: "Future[Any]"


class EngineLink:
    """An engine in its own process. Implements `Engine` of `replica/api/interfaces.py`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._phase = Phase.NEW
        self._child: EngineChild | None = None
        self._spare = Spare(lambda: EngineChild(self._handle, self._ended))
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, _Call] = {}
        self._call = 0
        self._lock = threading.RLock()
        self._versions: dict[str, tuple[Version, str]] = {}  # what the engine has, or will have
        self._entries: dict[str, AdapterState] = {}
        self._report = LoadReport()
        self._reported_s = time.monotonic()
        self._late = False
        self._callbacks: list[Callable[[list[AdapterState]], None]] = []
        self._cut_reason = ""
        self._strikes = 0
        self._since_s = 0.0  # when the phase began
        self._killed_s: float | None = None
        self._start_limit_s = float("inf")
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="engine-watch", daemon=True)

    @property
    def alive(self) -> bool:
        """True while the engine serves or is started again."""
        return self._phase in (Phase.SERVING, Phase.RESTARTING)

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Returns when the model is loaded. Raises the engine's StartupError."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        began_s = time.monotonic()
        self._launch()
        self._start_limit_s = max(_START_LEAST_S, _START_TIMES * (time.monotonic() - began_s))
        self._watcher.start()

    def _launch(self) -> None:
        """Starts a process that has all versions, and serves from it. Raises StartupError."""
        child = self._child = self._spare.take()
        if self._stopping.is_set():
            child.kill()
        config, report = child.start(self._config)
        with self._lock:
            self._config, self._phase = config, Phase.SERVING
            self._report, self._reported_s = report, time.monotonic()
            self._since_s, self._late, self._killed_s = self._reported_s, False, None
            for version, path in self._versions.values():
                child.send(Register(0, version, path))
            for call in self._calls.values():
                child.send(call.command)
            for stream in self._streams.values():
                self._submit(stream, child)
        self._tell([])

    async def stop(self) -> None:
        """Ends the engine's process. Running requests fail with EngineFailed."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        with self._lock:
            self._stopping.set()
            starting = self._phase is Phase.RESTARTING
            child = self._child
        if child is None:
            return
        if starting:
            child.kill()
        child.stop()
        if self._watcher.is_alive():
            self._watcher.join()
        self._spare.keep(False)
        with self._lock:
            self._phase = Phase.STOPPED

    async def generate(self, request: NewRequest) -> AsyncGenerator[Delta, None]:
        stream = Stream(request, asyncio.get_running_loop(), asyncio.Queue(), time.monotonic())
        with self._lock:
            assert request.id not in self._streams, f"{request.id} is already running"
            refusal: FleetError | None = None
            if not self.alive:
                refusal = EngineGone("the engine's process is gone")
            elif self._cut_reason:
                refusal = ShuttingDown(self._cut_reason, retry_after_s=1.0)
            else:
                self._streams[request.id] = stream
                if self._phase is Phase.SERVING:
                    self._submit(stream, self._child)
        if refusal is not None:
            yield Delta(request.id, error=refusal)
            return
        try:
            while True:
                delta = await stream.deltas.get()
                yield delta
                if delta.last:
                    return
        finally:
            with self._lock:
                if self._streams.get(request.id) is stream:
                    del self._streams[request.id]
                    if stream.submitted:
                        self._send(Cancel(request.id))

    def cut(self, reason: str) -> None:
        with self._lock:
            self._cut_reason = reason
            streams, self._streams = self._streams, {}
            for request_id, stream in streams.items():
                if stream.submitted:
                    self._send(Cancel(request_id))
        fail(streams, ShuttingDown(reason, retry_after_s=1.0))

    async def register(self, version: Version, path: str) -> None:
        await self._ask(lambda call: Register(call, version, path))

    async def forget(self, digest: str) -> None:
        with self._lock:
            self._versions.pop(digest, None)
        await self._ask(lambda call: Forget(call, digest))

    async def timeline(self, request_id: str) -> list[TimelineEvent]:
        """What happened to the request. Empty if it is unknown or forgotten."""
        timeline: list[TimelineEvent] = await self._ask(lambda call: GetTimeline(call, request_id))
        return timeline

    def adapter_states(self) -> list[AdapterState]:
        with self._lock:
            return [self._entries[digest] for digest in sorted(self._entries)]

    def report(self) -> LoadReport:
        """The engine's last report, with what this process knows: its age, and who waits here."""
        with self._lock:
            return dataclasses.replace(
                self._report,
                streams=len(self._streams),
                age_s=max(time.monotonic() - self._reported_s, 0.0),
                stalled=int(self._late or self._phase is not Phase.SERVING),
            )

    def on_residency(self, callback: Callable[[list[AdapterState]], None]) -> None:
        self._callbacks.append(callback)

    async def _ask(self, command: Callable[[int], Command]) -> Any:
        future: Future[Any] = Future()
        with self._lock:
            if not self.alive:
                raise EngineGone("the engine's process is gone")
            self._call += 1
            call = _Call(command(self._call), future)
            self._calls[self._call] = call
            if self._phase is Phase.SERVING:
                self._send(call.command)
        return await asyncio.wrap_future(future)

    def _send(self, command: Command) -> None:
        assert self._child is not None
        self._child.send(command)

    def _submit(self, stream: Stream, child: EngineChild | None) -> None:
        assert child is not None
        stream.submitted = True
        child.send(Submit(stream.request))

    def _handle(self, message: Message) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Delta]]] = {}
        with self._lock:
            if message.report is not None:
                self._report, self._reported_s = message.report, time.monotonic()
            for entry in message.residency:
                if entry.tier == "absent":
                    self._entries.pop(entry.digest, None)
                else:
                    self._entries[entry.digest] = entry
            for delta in message.outputs:
                stream = self._streams.get(delta.request_id)
                if stream is None:
                    continue  # cancelled while the delta was in the pipe
                if delta.last:
                    del self._streams[delta.request_id]
                by_loop.setdefault(stream.loop, []).append((stream, delta))
            # What a new engine registers again, nobody asked for.
            done = [(self._calls.pop(call), result) for call, result in message.done if call]
            for call, result in done:
                match call.command:
                    case Register(_, version, path) if result is None:
                        self._versions[version.digest] = version, path
        if message.residency:
            self._tell(message.residency)
        for loop, deltas in by_loop.items():
            deliver(loop, deltas)
        for call, result in done:
            _resolve(call.future, result)

    def _tell(self, entries: list[AdapterState]) -> None:
        for callback in self._callbacks:
            callback(entries)

    def _watch(self) -> None:
        looks = 0
        while not self._stopping.wait(_WATCH_S):
            now_s = time.monotonic()
            child = self._child
            assert child is not None
            self._fail_stale(now_s)
            if self._killed_s is not None and now_s > self._killed_s + _KILL_S:
                self._lose("the engine's process cannot be killed", Phase.DEAD)
                return
            if self._killed_s is None and self._phase is Phase.RESTARTING:
                if now_s > self._since_s + self._start_limit_s:
                    child.kill("the start of the engine hangs")
                    self._killed_s = now_s
                continue
            serving = self._phase is Phase.SERVING
            if serving:
                self._spare.keep(child.late(now_s + min(_SPARE_S, self._config.hang_s / 2)))
            looks = looks + 1 if serving and child.late(now_s) else 0
            if looks == _LATE_LOOKS:
                self._late = True
                self._tell([])  # the report says so before the process is gone
                child.kill(f"the engine has not moved for {self._config.hang_s:g} s or more")
                self._killed_s = now_s

    def _fail_stale(self, now_s: float) -> None:
        """Fails the requests that have waited too long for a new engine."""
        with self._lock:
            stale = {
                i: stream
                for i, stream in self._streams.items()
                if not stream.submitted and now_s > stream.since_s + _WAIT_S
            }
            for request_id in stale:
                del self._streams[request_id]
        fail(stale, EngineGone("the engine is being started again, which takes long"))

    def _ended(self, child: EngineChild, reason: str) -> None:
        """On the reader thread of an engine that is gone. The thread starts the next one."""
        with self._lock:
            if self._phase is Phase.DEAD:
                return
            steady = self._phase is Phase.SERVING and time.monotonic() > self._since_s + STEADY_S
            self._strikes = 1 if steady else self._strikes + 1
            given_up = self._stopping.is_set() or self._strikes > STRIKES_MAX
            self._lose(reason, Phase.DEAD if given_up else Phase.RESTARTING)
        if not given_up:
            self._restart(reason)

    def _lose(self, reason: str, phase: Phase) -> None:
        """Fails what the engine ran. With another one to come, what has not run yet waits."""
        dead = phase is Phase.DEAD
        with self._lock:
            self._phase, self._since_s, self._killed_s = phase, time.monotonic(), None
            lost = {i: s for i, s in self._streams.items() if s.submitted or dead}
            for request_id in lost:
                del self._streams[request_id]
            self._entries = {}
            self._report = dataclasses.replace(self._report, running=0, waiting=0, queued_tokens=0)
            calls, self._calls = self._calls, {}
            if not dead:
                self._calls = {n: c for n, c in calls.items() if isinstance(c.command, Register)}
        kind = EngineGone if self._stopping.is_set() else EngineFailed
        error = kind(f"{reason} while the request ran")
        error.death = secrets.token_hex(8)
        fail(lost, error)
        for number, call in calls.items():
            if number not in self._calls:
                _resolve(call.future, _without_engine(call.command, reason, dead))
        self._tell([])

    def _restart(self, reason: str) -> None:
        print(f"lorafleet: {reason}; starting it again", file=sys.stderr, flush=True)
        # The device's memory may take a moment to become free.
        self._stopping.wait(_BACKOFF_S * (self._strikes - 1))
        try:
            self._launch()
        except StartupError as error:
            assert self._child is not None
            self._ended(self._child, error.message)


def _without_engine(command: Command, reason: str, dead: bool) -> Result:
    """The result of a call that the engine has not answered and never will."""
    if isinstance(command, Forget):
        return None  # the next engine does not get the version
    if isinstance(command, GetTimeline) and not dead:
        return []
    return EngineFailed(reason)


def _resolve(future: "Future[Any]", result: Result) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, FleetError):
        future.set_exception(result)
    else:
        future.set_result(result)
