"""One engine process as its server sees it: commands out, messages in, and its end.

    server's process                                    engine's process
    any thread ──> outbox ──> writer thread ──┐     ┌──> reader ──> inbox ──> loop
                              reader thread <── pipe ── one message a step <───┘
    watcher    <───────────── pulse: the time by which the loop must have moved

The engine's process ends when the pipe closes, even if its parent was killed.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

from cluster.config import EngineConfig
from cluster.errors import FleetError, StartupError
from cluster.values import LoadReport
from replica.engine.messages import Command, Hangup, Message
from replica.engine.pulse import Pulse

_STOP_S = 5.0
_POLL_S = 0.02


class EngineChild:
    """Starts a process, which imports what it needs; `start` waits until it can serve.

    on_message: called on the reader thread. on_end: called there once with the reason, after the
    last message, when the process and its tensor-parallel workers are gone.
    """

    def __init__(
        self,
        on_message: Callable[[Message], None],
        on_end: Callable[["EngineChild", str], None],
    ) -> None:
        self._on_message, self._on_end = on_message, on_end
        self._outbox: SimpleQueue[Command] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pulse = Pulse()
        self._kill_reason = ""
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), self._pulse.fd]
        self._pipe = Connection(ours.detach())
        # A group of its own, so that a signal reaches the tensor-parallel workers too: a stopped
        # one would outlive its engine.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "replica.engine.engine_process", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        theirs.close()
        os.close(self._pulse.fd)  # the mapping stays

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, config: EngineConfig) -> tuple[EngineConfig, LoadReport]:
        """Returns when the model is loaded. Raises the engine's StartupError."""
        try:
            self._pipe.send(config)
            ready: FleetError | tuple[EngineConfig, LoadReport] = self._pipe.recv()
        except (EOFError, OSError):
            self._close()
            status = self.process.returncode
            raise StartupError(f"the engine's process ended with status {status}") from None
        if isinstance(ready, FleetError):
            self._close()
            raise ready
        for name, target in (("engine-writer", self._write), ("engine-reader", self._read)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return ready

    def send(self, command: Command) -> None:
        self._outbox.put(command)

    def late(self, now_s: float) -> bool:
        """True if the engine's loop should have moved by now, on the monotonic clock."""
        return self._pulse.late(now_s)

    def kill(self, reason: str = "") -> None:
        """Ends the process and its workers at once. reason: for `on_end`."""
        self._kill_reason = reason
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Lets the process end by itself, or kills it. Returns when it and the threads are gone."""
        self._outbox.put(Hangup())
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def discard(self) -> None:
        """Ends a process that was never started."""
        self.kill()
        self._close()

    def _write(self) -> None:
        try:
            while True:
                commands = [self._outbox.get()]
                while not self._outbox.empty():
                    commands.append(self._outbox.get())
                self._pipe.send(commands)
                if any(isinstance(command, Hangup) for command in commands):
                    return
        except OSError:
            return  # the reader sees the same error

    def _read(self) -> None:
        reason = "the engine's process ended"
        try:
            while True:
                message = self._pipe.recv()
                if isinstance(message, FleetError):
                    reason = message.message
                    break
                self._on_message(message)
        except (EOFError, OSError, pickle.UnpicklingError):
            pass
        self._outbox.put(Hangup())
        self._threads[0].join()
        self._close()
        self._on_end(self, self._kill_reason or reason)

    def _close(self) -> None:
        """Returns when the process and its workers are gone, or will not go.

        A worker is an orphan once its engine has ended. Where nobody reaps orphans it stays a
        zombie of the group, which is why the wait has a bound.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        deadline_s = time.monotonic() + _STOP_S
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline_s:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.poll()
                time.sleep(_POLL_S)
        self._pipe.close()


class Spare:
    """A process that is started when another one may be needed soon. Any thread may call this."""

    def __init__(self, make: Callable[[], EngineChild]) -> None:
        self._make = make
        self._child: EngineChild | None = None
        self._lock = threading.Lock()

    def keep(self, wanted: bool) -> None:
        """From now on there is one, if the system has room for it, or none."""
        with self._lock:
            if wanted and self._child is None:
                with contextlib.suppress(OSError):
                    self._child = self._make()
            elif not wanted and self._child is not None:
                self._child.discard()
                self._child = None

    def take(self) -> EngineChild:
        """The one that was kept, or a new one."""
        with self._lock:
            child, self._child = self._child, None
        return child or self._make()
