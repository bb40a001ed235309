"""The engine's process: it receives commands and sends one message per step (see `link.py`)."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from cluster.errors import EngineFailed, FleetError
from replica.engine.engine import Engine
from replica.engine.messages import (
    Cancel,
    Command,
    Forget,
    GetTimeline,
    Hangup,
    Message,
    Register,
    Submit,
    Wake,
)
from replica.engine.pulse import SLOW_S, Pulse
from replica.engine.sizing import described
from replica.scheduling.request import Delta

# Interval between load reports of a busy engine. Changes of adapter states are sent at once.
_REPORT_S = 0.05
# An idle engine steps at this interval: the retry of a pinned adapter may be due.
_IDLE_S = 1.0
# Net allocations that trigger a garbage collection: about those of 60 large steps.
_COLLECT_THRESHOLD = 50_000
# Once the engine stops or raises, the process ends within this time.
_END_S = 2.0


class Server:
    """Steps the engine, executes commands and sends the results."""

    def __init__(
        self, pipe: Connection, engine: Engine, inbox: "SimpleQueue[Command]", pulse: Pulse
    ) -> None:
        self._pipe = pipe
        self._engine = engine
        self._inbox = inbox
        self._pulse = pulse
        self._next_report_s = 0.0

    def serve(self) -> None:
        while True:
            message = Message()
            if self._receive(message):
                return
            message.outputs += self._engine.step()
            message.residency = self._engine.changes()
            if self._engine.idle or self._engine.committed_s >= self._next_report_s:
                self._report(message)
            if message:
                self._pipe.send(message)

    def _report(self, message: Message) -> None:
        message.report = self._engine.report()
        # By the engine's own time of the last commit, so that a step need not read the clock.
        self._next_report_s = self._engine.committed_s + _REPORT_S

    def _receive(self, message: Message) -> bool:
        """Executes the commands that have arrived. An idle engine waits for one. Returns True on
        Hangup.
        """
        commands: list[Command] = []
        if self._engine.idle:
            now_s = time.monotonic()
            wait_s = self._idle_wait_s(now_s)
            self._pulse.expect(now_s + wait_s + self._engine.config.hang_s)
            with contextlib.suppress(Empty):
                commands.append(self._inbox.get(timeout=wait_s))
        while not self._inbox.empty():
            commands.append(self._inbox.get())
        hangups = [self._execute(command, message) for command in commands]
        return any(hangups)

    def _idle_wait_s(self, now_s: float) -> float:
        if self._engine.wake_s is None:
            return _IDLE_S
        return min(max(self._engine.wake_s - now_s, 0.0), _IDLE_S)

    def _execute(self, command: Command, message: Message) -> bool:
        """Returns True on Hangup."""
        match command:
            case Submit(request):
                try:
                    self._engine.add(request)
                except FleetError as error:
                    message.outputs.deltas.append(Delta(request.id, error=error))
            case Cancel(request_id):
                self._engine.cancel(request_id)
            case Register(call, version, path):
                self._pulse.expect(time.monotonic() + SLOW_S)  # it may read the adapter's header
                try:
                    self._engine.register(version, path)
                    message.done.append((call, None))
                except FleetError as error:
                    message.done.append((call, error))
            case Forget(call, digest):
                self._engine.forget(digest)
                message.done.append((call, None))
            case GetTimeline(call, request_id):
                message.done.append((call, self._engine.timeline(request_id)))
            case Wake():
                pass
            case Hangup():
                return True
        return False


def _listen(pipe: Connection, inbox: "SimpleQueue[Command]") -> None:
    try:
        while True:
            for command in pipe.recv():
                inbox.put(command)
    except (EOFError, OSError):
        os._exit(0)  # the server is gone, so nobody needs the current step


def calm_collector() -> None:
    """Makes garbage collection rare. Existing objects live as long as the process, and steps create
    few cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_THRESHOLD)


def _expect_compilations(pulse: Pulse) -> None:
    """Gives a step more time while Triton compiles a kernel for it."""
    try:
        from triton import knobs
    except ImportError:  # a CPU needs no Triton
        return

    def before(**_: Any) -> bool:
        pulse.expect(time.monotonic() + SLOW_S)
        return False  # True would skip the compilation

    knobs.runtime.jit_cache_hook = before


def _end_soon() -> None:
    """Bounds the rest of the process: at exit, Python waits for a loader's thread without end, and
    the thread may be stuck in a read.
    """
    timer = threading.Timer(_END_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops this process
    pipe, pulse = Connection(int(sys.argv[1])), Pulse(int(sys.argv[2]))
    inbox: SimpleQueue[Command] = SimpleQueue()
    try:
        config = pipe.recv()
        try:
            engine = Engine(config, wake=lambda: inbox.put(Wake()), expect=pulse.expect)
        except FleetError as error:
            pipe.send(error)
            return
        for line in described(config, engine.config, engine.shape):
            print(f"lorafleet: {line}", file=sys.stderr, flush=True)
        pipe.send((engine.config, engine.report()))
        calm_collector()
        if engine.runner.device.type == "cuda":
            _expect_compilations(pulse)
        threading.Thread(target=_listen, args=(pipe, inbox), name="reader", daemon=True).start()
        try:
            Server(pipe, engine, inbox, pulse).serve()
        except EngineFailed as error:
            print(f"lorafleet: {error.message}", file=sys.stderr, flush=True)
            pipe.send(error)
            os._exit(1)  # a kernel on the device may never end
        finally:
            _end_soon()
        engine.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server is gone


if __name__ == "__main__":
    main()
