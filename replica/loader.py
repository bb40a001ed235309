"""Loads adapter images beside the running batch: threads that read files and copy to the device."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from cluster.errors import AdapterFailed, FleetError
from replica.adapter_files import inspect
from replica.arena import Arena
from replica.image import Layout, read_image
from replica.residency import Load
from replica.shape import ModelShape

# Beside a batch that uses every core, a loader at the same priority doubles the step. 10 leaves it
# about a tenth of a core when there is competition, and a whole one when there is none.
_NICENESS = 10


@dataclass(frozen=True, slots=True)
class Loaded:
    """How one load ended: with a layout, or with an error."""

    load: Load
    layout: Layout | None
    seconds: float
    error: str | None = None


class Loader:
    """At most `threads` loads at a time. wake: called, on a loader thread, when one has ended."""

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        arena: Arena,
        rank_max: int,
        threads: int,
        wake: Callable[[], None],
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._arena = arena
        self._rank_max = rank_max
        self._wake = wake
        self._done: SimpleQueue[Loaded] = SimpleQueue()
        self._threads = ThreadPoolExecutor(threads, "adapter-loader", initializer=_step_back)

    def begin(self, load: Load) -> None:
        self._threads.submit(self._run, load)

    def run(self, load: Load) -> Loaded:
        """The same, while the caller waits."""
        return self._threads.submit(self._load, load).result()

    def ended(self) -> list[Loaded]:
        """The loads that ended since the last call."""
        ended = []
        while True:
            try:
                ended.append(self._done.get_nowait())
            except Empty:
                return ended

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, load: Load) -> None:
        self._done.put(self._load(load))
        self._wake()

    def _load(self, load: Load) -> Loaded:
        start_s = time.monotonic()
        try:
            image = read_image(load.path, self._shape, self._dtype)
            if inspect(load.path, self._shape, self._rank_max).digest != load.digest:
                raise AdapterFailed(f"{load.path}: the files changed since they were registered")
            assert image.bytes <= load.bytes, f"{image.bytes} bytes for a place of {load.bytes}"
            self._arena.copy_in(load.offset, image)
            return Loaded(load, image.layout, time.monotonic() - start_s)
        except (FleetError, OSError, MemoryError, RuntimeError) as error:
            # Whatever one adapter's files or the device's memory do, only its requests suffer.
            return Loaded(load, None, time.monotonic() - start_s, str(error) or repr(error))


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
