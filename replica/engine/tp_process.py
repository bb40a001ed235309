"""A worker's process: it repeats the steps of rank 0 (see `tensor_parallel.py`)."""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import NoReturn

from cluster.config import EngineConfig
from replica.adapters.arena import Clear, Place
from replica.adapters.image import Image
from replica.adapters.loader import Loader
from replica.engine.runner import Runner
from replica.engine.tp_messages import (
    AdapterLoaded,
    Answer,
    Command,
    CopyPages,
    Drop,
    FinishPageCopy,
    Hello,
    LoadAdapter,
    MovePages,
    PageTables,
    Ready,
    Step,
    WorkerFailed,
)
from replica.model.ranks import Ranks, device_of, open_store
from replica.model.shape import Shard, read_shape
from replica.scheduling.adapter import Slide


class TensorParallelWorker:
    """Executes commands on one thread. Loads run on the loader's threads and answer from there."""

    def __init__(self, pipe: Connection, config: EngineConfig, ranks: Ranks) -> None:
        self._pipe = pipe
        self._sending = threading.Lock()
        shape = read_shape(config.model)
        self._runner = Runner(config, shape, ranks)
        self._loader = Loader(
            shape,
            self._runner.dtype,
            self._runner.arena,
            config.rank_max,
            config.loads_in_flight_max,
            self._answer_loads,
            self._runner.busy,
            ranks.shard,
        )
        self._images: dict[str, Image] = {}  # the host tier
        self._tables = PageTables()

    def serve(self) -> None:
        self.answer(Ready())
        while True:
            self._execute(self._pipe.recv())

    def answer(self, answer: Answer) -> None:
        with self._sending:
            self._pipe.send(answer)

    def _execute(self, command: Command) -> None:
        match command:
            case Step():
                self._runner.launch(self._tables.unpack(command))
            case LoadAdapter(load, from_host, keep):
                self._loader.begin(load, self._images[load.digest] if from_host else None, keep)
            case Place(slot, offset, layout):
                self._runner.arena.place(slot, offset, layout)
            case Clear(slot):
                self._runner.arena.clear(slot)
            case Slide(slot, source, target, size):
                self._runner.arena.slide(slot, source, target, size)
            case MovePages(moves):
                self._runner.move_pages(moves)
            case CopyPages(copy):
                self._runner.copy_pages(copy)
            case FinishPageCopy(number):
                self._runner.finish_page_copy(number)
            case Drop(digest):
                self._images.pop(digest, None)

    def _answer_loads(self) -> None:
        try:
            for ended in self._loader.ended():
                if ended.image is not None:
                    self._images[ended.load.digest] = ended.image
                self.answer(AdapterLoaded(ended.load.digest, ended.error))
        except BaseException as error:  # the loader's thread would swallow it
            _exit_failed(self._pipe, error)


def _exit_with_rank_0(lifeline: socket.socket) -> None:
    """Waits for rank 0 to close its end of the lifeline or to die. The main thread may be stuck in
    a collective operation, so this thread ends the process.
    """
    lifeline.recv(1)
    os._exit(0)


def _exit_failed(pipe: Connection, error: BaseException) -> NoReturn:
    with contextlib.suppress(OSError):  # rank 0 is gone, so the error is a consequence
        pipe.send(WorkerFailed(f"failed: {error!r}"))
        traceback.print_exception(error)
    os._exit(1)  # other threads may wait for ranks without end


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 stops this process
    pipe = Connection(int(sys.argv[1]))
    lifeline = socket.socket(fileno=int(sys.argv[2]))
    threading.Thread(
        target=_exit_with_rank_0, args=(lifeline,), name="lifeline", daemon=True
    ).start()
    try:
        config, rank, port = pipe.recv()
        device = device_of(config, rank)
        pipe.send(Hello())
        ranks = Ranks(Shard(rank, config.tensor_parallel), device, open_store(port)[0])
        TensorParallelWorker(pipe, config, ranks).serve()
    except Exception as error:
        _exit_failed(pipe, error)


if __name__ == "__main__":
    main()
