"""Runs the engine in its own process, so that Python threads of the server cannot slow its steps.

    server's process                             engine's process
    any event loop ── generate ──┐          ┌──> reader ──> inbox ──> loop: plan → run → commit
    writer thread  <── outbox <──┘ ─ pipe ──┘                           │
    reader thread  <──────────────── pipe ── one message a step <───────┘

Each side sends at most one message per step. The engine's process ends when the pipe closes, even
if its parent was killed. When the engine's process ends, every stream fails.
"""

import asyncio
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from cluster.config import EngineConfig
from cluster.errors import EngineFailed, FleetError, ShuttingDown, StartupError
from cluster.values import AdapterState, LoadReport, Version
from replica.engine.messages import (
    Cancel,
    Command,
    Forget,
    GetTimeline,
    Hangup,
    Message,
    Register,
    Result,
    Submit,
)
from replica.scheduling.request import Delta, NewRequest
from replica.scheduling.timeline import TimelineEvent

_STOP_S = 5.0


@dataclass(slots=True)
class _Stream:
    loop: asyncio.AbstractEventLoop
    deltas: "asyncio.Queue[Delta]"


class EngineLink:
    """An engine in its own process. Implements `Engine` of `replica/api/interfaces.py`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._outbox: SimpleQueue[Command] = SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._call = 0
        self._lock = threading.Lock()
        self._entries: dict[str, AdapterState] = {}
        self._report = LoadReport()
        self._callbacks: list[Callable[[list[AdapterState]], None]] = []
        self._threads: list[threading.Thread] = []
        self._alive = False
        self._cut_reason = ""

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Returns when the model is loaded. Raises the engine's StartupError."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        self._pipe = Connection(ours.detach())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "replica.engine.engine_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            self._pipe.send(self._config)
            ready = self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise StartupError(f"the engine's process ended with status {code}") from None
        if isinstance(ready, FleetError):
            self._process.wait()
            raise ready
        self._config, self._report = ready
        self._alive = True
        for name, target in (("engine-writer", self._write), ("engine-reader", self._read)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    async def stop(self) -> None:
        """Ends the engine's process. Running requests fail with EngineFailed."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        if self._process is None:
            return
        self._outbox.put(Hangup())
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()

    async def generate(self, request: NewRequest) -> AsyncGenerator[Delta, None]:
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        with self._lock:
            assert request.id not in self._streams, f"{request.id} is already running"
            refusal: FleetError | None = None
            if not self._alive:
                refusal = EngineFailed("the engine's process is gone")
            elif self._cut_reason:
                refusal = ShuttingDown(self._cut_reason, retry_after_s=1.0)
            else:
                self._streams[request.id] = stream
        if refusal is not None:
            yield Delta(request.id, error=refusal)
            return
        self._outbox.put(Submit(request))
        try:
            while True:
                delta = await stream.deltas.get()
                yield delta
                if delta.last:
                    return
        finally:
            with self._lock:
                ended = self._streams.pop(request.id, None) is None
            if not ended:
                self._outbox.put(Cancel(request.id))

    def cut(self, reason: str) -> None:
        with self._lock:
            self._cut_reason = reason
            streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._outbox.put(Cancel(request_id))
            error = ShuttingDown(reason, retry_after_s=1.0)
            _deliver(stream.loop, [(stream, Delta(request_id, error=error))])

    async def register(self, version: Version, path: str) -> None:
        await self._ask(lambda call: Register(call, version, path))

    async def forget(self, digest: str) -> None:
        await self._ask(lambda call: Forget(call, digest))

    async def timeline(self, request_id: str) -> list[TimelineEvent]:
        """What happened to the request. Empty if it is unknown or forgotten."""
        timeline: list[TimelineEvent] = await self._ask(lambda call: GetTimeline(call, request_id))
        return timeline

    def adapter_states(self) -> list[AdapterState]:
        with self._lock:
            return [self._entries[digest] for digest in sorted(self._entries)]

    def report(self) -> LoadReport:
        return self._report

    def on_residency(self, callback: Callable[[list[AdapterState]], None]) -> None:
        self._callbacks.append(callback)

    async def _ask(self, command: Callable[[int], Command]) -> Any:
        future: Future[Any] = Future()
        with self._lock:
            if not self._alive:
                raise EngineFailed("the engine's process is gone")
            self._call += 1
            self._calls[self._call] = future
            self._outbox.put(command(self._call))
        return await asyncio.wrap_future(future)

    def _write(self) -> None:
        assert self._pipe is not None
        try:
            while True:
                commands = [self._outbox.get()]
                while not self._outbox.empty():
                    commands.append(self._outbox.get())
                self._pipe.send(commands)
                if any(isinstance(command, Hangup) for command in commands):
                    return
        except OSError:
            return  # the reader sees the same error and fails every stream

    def _read(self) -> None:
        assert self._pipe is not None
        try:
            while True:
                message = self._pipe.recv()
                if isinstance(message, FleetError):
                    self._fail_everything(message.message)
                    return
                self._handle(message)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._fail_everything("the engine's process ended")

    def _handle(self, message: Message) -> None:
        if message.report is not None:
            self._report = message.report
        if message.residency:
            self._update_states(message.residency)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Delta]]] = {}
        with self._lock:
            for delta in message.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is None:
                    continue  # cancelled while the delta was in the pipe
                if delta.last:
                    del self._streams[delta.request_id]
                by_loop.setdefault(stream.loop, []).append((stream, delta))
            done = [(self._calls.pop(call), result) for call, result in message.done]
        for loop, deltas in by_loop.items():
            _deliver(loop, deltas)
        for future, result in done:
            _resolve(future, result)

    def _update_states(self, entries: list[AdapterState]) -> None:
        with self._lock:
            for entry in entries:
                if entry.tier == "absent":
                    self._entries.pop(entry.digest, None)
                else:
                    self._entries[entry.digest] = entry
        for callback in self._callbacks:
            callback(entries)

    def _fail_everything(self, reason: str) -> None:
        with self._lock:
            self._alive = False
            streams, self._streams = self._streams, {}
            calls, self._calls = self._calls, {}
        self._outbox.put(Hangup())
        for request_id, stream in streams.items():
            error = EngineFailed(f"{reason} while the request ran")
            _deliver(stream.loop, [(stream, Delta(request_id, error=error))])
        for future in calls.values():
            _resolve(future, EngineFailed(reason))


def _deliver(loop: asyncio.AbstractEventLoop, deltas: list[tuple[_Stream, Delta]]) -> None:
    def put() -> None:
        for stream, delta in deltas:
            stream.deltas.put_nowait(delta)

    with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits there
        loop.call_soon_threadsafe(put)


def _resolve(future: "Future[Any]", result: Result) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, FleetError):
        future.set_exception(result)
    else:
        future.set_result(result)
