"""Rank 0 of a tensor-parallel engine. Each other rank is a worker process that repeats its steps.

    engine's process (rank 0)                          one process per worker
    scheduler ── Runner, Arena, Loader ── commands ──> Runner, Arena, Loader of its part
                     ║                <── answers ──── loads that ended
                     ╚═══════════ sums and logits (gloo, NCCL) ═════════════╝

Each worker has one pipe. It gets commands in the order in which rank 0 executes them. Only loads
run concurrently, so only they are answered: an image is loaded when every rank has its part.
Workers end when rank 0 ends, even if it is killed. When a worker ends, the engine is lost and its
next call raises EngineFailed.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import Empty, SimpleQueue

from cluster.config import EngineConfig
from cluster.errors import EngineFailed, StartupError
from replica.adapters.image import Image
from replica.adapters.loader import Loaded, Loader
from replica.engine.node import read_node
from replica.engine.runner import Runner
from replica.engine.sizing import settled
from replica.engine.tp_messages import (
    AdapterLoaded,
    Answer,
    Command,
    Drop,
    Hello,
    LoadAdapter,
    PageTables,
    Ready,
    WorkerFailed,
)
from replica.model.launch import Executor, Row, Ticket
from replica.model.ranks import Ranks, device_of, open_store
from replica.model.shape import Shape, Shard
from replica.scheduling.adapter import Load
from replica.scheduling.request import PromptResult, Sampled

_STOP_S = 5.0
# Time after the loss of a rank until rank 0, stuck in a collective operation, exits.
_STUCK_S = 10.0


class _Process:
    """A worker's process. pipe: commands and answers. lifeline: carries no data; closing it ends
    the worker.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        self._lifeline, their_lifeline = socket.socketpair()
        fds = [theirs.fileno(), their_lifeline.fileno()]
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "replica.engine.tp_process", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        their_lifeline.close()
        self.pipe = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._popen.pid

    def exit_reason(self) -> str:
        """Call it after the pipe has closed."""
        try:
            status = self._popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def end(self) -> None:
        self._lifeline.close()
        try:
            self._popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class TensorParallelWorkers:
    """The workers of an engine: ranks 1, 2 … One thread calls it.

    wake: called on any thread when a worker has answered or ended.
    """

    def __init__(self, config: EngineConfig, wake: Callable[[], None]) -> None:
        """Raises StartupError if a worker fails to start."""
        self._wake = wake
        self._answers: SimpleQueue[tuple[int, Answer | None]] = SimpleQueue()
        self._failure: EngineFailed | None = None
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._closed = threading.Event()
        self._waiting = False
        device = device_of(config, 0)
        store, port = open_store()
        self._processes = [_Process(rank) for rank in range(1, config.tensor_parallel)]
        self._threads = [
            threading.Thread(target=self._listen, args=(process,), name="rank", daemon=True)
            for process in self._processes
        ]
        for thread in self._threads:
            thread.start()
        try:
            for process in self._processes:
                process.pipe.send((config, process.rank, port))
            self._await_all(Hello)
            with self.together():
                self.ranks = Ranks(Shard(0, config.tensor_parallel), device, store)
        except (EngineFailed, OSError) as error:
            self._end_processes()
            raise StartupError(str(error)) from error
        except BaseException:
            self._end_processes()
            raise

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def count(self) -> int:
        return len(self._processes)

    def wait_ready(self) -> None:
        """Returns when all workers have loaded the model. Raises EngineFailed if one has ended."""
        self._await_all(Ready)

    def tell(self, command: Command) -> None:
        """Sends a command to all workers. Raises EngineFailed if one is gone."""
        self.check()
        message = ForkingPickler.dumps(command)
        try:
            for process in self._processes:
                process.pipe.send_bytes(message)
        except OSError:
            self._raise_if_lost()
            raise

    def hear(self, *, wait: bool = False) -> tuple[int, Answer] | None:
        """(rank, answer), or None if there is none. Raises EngineFailed if a rank is gone."""
        self.check()
        try:
            rank, answer = self._answers.get(block=wait)
        except Empty:
            return None
        if answer is None:
            self.check()
            raise AssertionError("a rank ended without a failure")
        return rank, answer

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wraps work that waits for all ranks. Raises EngineFailed if a rank is lost during it."""
        self._waiting = True  # before the check, so that a loss is seen either here or in `_lost`
        try:
            self.check()
            yield
        except RuntimeError:
            self._raise_if_lost()  # the loss of a rank explains more than the error that it caused
            raise
        finally:
            self._waiting = False
        self.check()

    def leading(self, executor: Executor) -> "LeadingExecutor":
        """An executor that launches on all ranks. executor: rank 0's."""
        return LeadingExecutor(executor, self)

    def close(self) -> None:
        self._end_processes()
        self.ranks.close()

    def _end_processes(self) -> None:
        self._closed.set()
        for process in self._processes:
            process.end()
        for thread in self._threads:
            thread.join()

    def _await_all(self, kind: type[Answer]) -> None:
        missing = {process.rank for process in self._processes}
        while missing:
            heard = self.hear(wait=True)
            assert heard is not None and isinstance(heard[1], kind), heard
            missing.remove(heard[0])

    def _raise_if_lost(self) -> None:
        """Raises EngineFailed if a worker has ended. Waits for the news, which may lag an error."""
        self._failed.wait(_STOP_S)
        self.check()

    def _listen(self, process: _Process) -> None:
        reason = None
        try:
            while True:
                answer: Answer = process.pipe.recv()
                if isinstance(answer, WorkerFailed):
                    reason = answer.reason
                else:
                    self._answers.put((process.rank, answer))
                    self._wake()
        except (EOFError, OSError):
            if not self._closed.is_set():
                self._lost(process, reason or process.exit_reason())

    def _lost(self, process: _Process, reason: str) -> None:
        with self._lock:
            if self._failure is None:
                ranks = len(self._processes) + 1
                self._failure = EngineFailed(f"rank {process.rank} of {ranks} {reason}")
        self._failed.set()
        self._answers.put((process.rank, None))
        self._wake()
        self._exit_if_stuck()

    def _exit_if_stuck(self) -> None:
        """Gloo notices a lost peer. A GPU kernel waits for it without end and cannot be stopped."""
        if self._waiting and not self._closed.wait(_STUCK_S) and self._waiting:
            print(f"lorafleet: {self._failure}", file=sys.stderr, flush=True)
            os._exit(1)


def start_ranks(
    config: EngineConfig, shape: Shape, wake: Callable[[], None]
) -> tuple[Runner, TensorParallelWorkers]:
    """Starts all ranks. Returns when all have loaded the model. Raises StartupError."""
    shape.divided(config.tensor_parallel)  # raises before processes start
    # Settled here once, so that all ranks have the same sizes.
    config = settled(config, shape, device_of(config, 0).type, read_node())
    workers = TensorParallelWorkers(config, wake)
    try:
        with workers.together():
            runner = Runner(config, shape, workers.ranks, workers, wake)
        workers.wait_ready()
    except EngineFailed as error:
        workers.close()
        raise StartupError(error.message) from error
    except BaseException:
        workers.close()
        raise
    return runner, workers


class LeadingExecutor:
    def __init__(self, executor: Executor, workers: TensorParallelWorkers) -> None:
        self._executor = executor
        self._workers = workers
        self._tables = PageTables()

    def launch(self, rows: Sequence[Row]) -> Ticket:
        self._workers.tell(self._tables.pack(rows))
        with self._workers.together():
            return _SharedTicket(self._executor.launch(rows), self._workers)


class _SharedTicket:
    def __init__(self, ticket: Ticket, workers: TensorParallelWorkers) -> None:
        self._ticket = ticket
        self._workers = workers

    def results(self) -> list[Sampled | None]:
        with self._workers.together():
            return self._ticket.results()

    def prompts(self) -> dict[int, PromptResult]:
        return self._ticket.prompts()


class JointLoader:
    """A `Loader` for all ranks: a load has ended when it has ended on every rank."""

    def __init__(self, own: Loader, workers: TensorParallelWorkers) -> None:
        self._own = own
        self._workers = workers
        self._missing: dict[str, int] = {}  # digest → workers that have not answered
        self._errors: dict[str, str] = {}
        self._ended_here: dict[str, Loaded] = {}

    def begin(self, load: Load, image: Image | None, keep: bool) -> None:
        self._tell(load, image, keep)
        self._own.begin(load, image, keep)

    def run(self, load: Load, image: Image | None, keep: bool) -> Loaded:
        self._tell(load, image, keep)
        self._ended_here[load.digest] = self._own.run(load, image, keep)
        while self._missing[load.digest]:
            self._take(self._workers.hear(wait=True))
        return self._joined(load.digest)

    def ended(self) -> list[Loaded]:
        """Raises EngineFailed if a rank is gone."""
        while (heard := self._workers.hear()) is not None:
            self._take(heard)
        for ended in self._own.ended():
            self._ended_here[ended.load.digest] = ended
        return [
            self._joined(digest) for digest in list(self._ended_here) if not self._missing[digest]
        ]

    def close(self) -> None:
        self._own.close()

    def _tell(self, load: Load, image: Image | None, keep: bool) -> None:
        assert load.digest not in self._missing, f"{load.digest} is already loading"
        self._missing[load.digest] = self._workers.count
        self._workers.tell(LoadAdapter(load, image is not None, keep))

    def _take(self, heard: tuple[int, Answer] | None) -> None:
        assert heard is not None
        rank, answer = heard
        assert isinstance(answer, AdapterLoaded), answer
        self._missing[answer.digest] -= 1
        if answer.error is not None:
            self._errors[answer.digest] = f"rank {rank}: {answer.error}"

    def _joined(self, digest: str) -> Loaded:
        del self._missing[digest]
        ended = self._ended_here.pop(digest)
        elsewhere = self._errors.pop(digest, None)
        error = ended.error or elsewhere
        if error is None:
            return ended
        self._workers.tell(Drop(digest))
        return Loaded(ended.load, None, ended.seconds, error)
