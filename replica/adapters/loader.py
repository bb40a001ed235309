"""Loads adapter images while batches run: threads read files and copy to the device."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from cluster.errors import FleetError
from replica.adapters.arena import Arena
from replica.adapters.gains import BaseWeights
from replica.adapters.host_pool import Piece
from replica.adapters.image import CHUNK_BYTES, Image, Layout, read_image
from replica.model.shape import Shape, Shard
from replica.scheduling.adapter import Load

# On a CPU, a load alternates work and rest while batches run: all cores compute, and one late core
# delays the whole batch. A lower thread priority would be worse, because a loader that waits for a
# core may hold the GIL.
_WORK_S = 0.0003
_REST_S = 0.002
# Bytes of the file between two looks at the clock: some 0.2 ms.
_PIECE_BYTES = 2**18
# A load starts without rests: a small image is done before a step ends.
_HEAD_START_S = 0.004


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load that ended with a layout or with an error. image: set if it must be kept."""

    load: Load
    layout: Layout | None
    seconds: float
    error: str | None = None
    image: Image | None = None


class Loader:
    """Runs at most `threads` loads at a time.

    shape: of the whole model. shard: the part of each image that this rank loads. base: its
    weights, if it has all of them.
    wake: called on a loader thread when a load has ended. busy: True while batches run.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        arena: Arena,
        rank_max: int,
        threads: int,
        wake: Callable[[], None],
        busy: Callable[[], bool],
        shard: Shard = Shard(),
        base: BaseWeights | None = None,
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._arena = arena
        self._rank_max = rank_max
        self._wake = wake
        self._busy = busy
        self._active = 0
        self._shard = shard
        self._base = base
        self._lock = threading.Lock()
        self._done: SimpleQueue[Loaded] = SimpleQueue()
        self._bug: BaseException | None = None
        self._threads = single_threaded(threads)

    def begin(self, load: Load, image: Image | None, keep: bool) -> None:
        """image: the image, if host memory has it. keep: return the image in `Loaded`."""
        self._threads.submit(self._run, load, image or self._host_piece(load, keep), keep)

    def run(self, load: Load, image: Image | None, keep: bool) -> Loaded:
        """Like `begin`, but waits for the load."""
        held = image or self._host_piece(load, keep)
        return self._threads.submit(self._load, load, held, keep, _no_pause).result()

    def ended(self) -> list[Loaded]:
        """The loads that ended since the last call. Raises an unexpected exception of a load."""
        if self._bug is not None:
            raise self._bug
        ended = []
        while True:
            try:
                ended.append(self._done.get_nowait())
            except Empty:
                return ended

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _host_piece(self, load: Load, keep: bool) -> Piece | None:
        """Page-locked memory for an image that must be kept; None: use other memory."""
        pool = self._arena.host_pool
        return pool.take(load.bytes) if keep and pool is not None else None

    def _run(self, load: Load, held: Image | Piece | None, keep: bool) -> None:
        self._change_active(1)
        try:
            self._done.put(self._load(load, held, keep, self._pause_function()))
        except BaseException as bug:
            self._bug = bug
            raise
        finally:
            self._change_active(-1)
            self._wake()

    def _load(
        self,
        load: Load,
        held: Image | Piece | None,
        keep: bool,
        pause: Callable[[], None],
    ) -> Loaded:
        """held: the image, or memory to read it into."""
        start_s = time.monotonic()
        try:
            if held is None and not keep and self._arena.in_place:
                image, layout = None, self._read_in_place(load, pause)
            else:
                image = held if isinstance(held, Image) else self._read(load, held, pause)
                self._arena.copy_in(load.offset, image, pause)
                layout = image.layout
            seconds = time.monotonic() - start_s
            return Loaded(load, layout, seconds, image=image if keep else None)
        except (FleetError, OSError, MemoryError, RuntimeError) as error:
            # A load's failure must affect only requests for that adapter.
            return Loaded(load, None, time.monotonic() - start_s, str(error) or repr(error))

    def _read_in_place(self, load: Load, pause: Callable[[], None]) -> Layout:
        """Reads straight into the arena, without a copy or a temporary buffer."""
        with self._arena.writing(load.offset, load.bytes) as target:
            return self._read(load, target, pause).layout

    def _read(
        self, load: Load, into: torch.Tensor | Piece | None, pause: Callable[[], None]
    ) -> Image:
        image = read_image(
            load.path,
            self._shape,
            self._dtype,
            into=into,
            rank_max=self._rank_max,
            base=self._base,
            shard=self._shard,
            chunk_bytes=_PIECE_BYTES if self._arena.in_place else CHUNK_BYTES,
            pause=pause,
        )
        assert image.bytes <= load.bytes, f"{image.bytes} bytes in an extent of {load.bytes}"
        return image

    def _change_active(self, change: int) -> None:
        with self._lock:
            self._active += change

    def _pause_function(self) -> Callable[[], None]:
        """A function that a load calls often. It rests while batches need the cores."""
        if not self._arena.in_place:
            return _no_pause
        start_s = since_s = time.monotonic()

        def pause() -> None:
            nonlocal since_s
            if time.monotonic() - since_s >= _WORK_S:
                if self._busy() and since_s - start_s >= _HEAD_START_S:
                    time.sleep(_REST_S * self._active)
                since_s = time.monotonic()

        return pause


def single_threaded(threads: int) -> ThreadPoolExecutor:
    """Threads on which torch computes alone. Its thread pool belongs to the batches: a load that
    used it would stall their steps.
    """
    pool = ThreadPoolExecutor(threads, "adapter-loader")
    together = threading.Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first use of the count sets it, also after this
        torch.set_num_threads(1)
        together.wait()  # so that each call gets a thread of its own

    batches = torch.get_num_threads()
    wait([pool.submit(begin) for _ in range(threads)])
    # The count is each thread's own, but the last one set is also what new threads begin with.
    torch.set_num_threads(batches)
    return pool


def _no_pause() -> None:
    pass
