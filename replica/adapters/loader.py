"""Loads adapter images beside the running batch: threads that read files and copy to the device."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from cluster.errors import AdapterFailed, FleetError
from replica.adapters.arena import Arena
from replica.adapters.host_pool import Piece
from replica.adapters.image import Image, Layout, read_image
from replica.model.shape import ModelShape, Shard
from replica.scheduling.adapter import Load

# While batches run, a load works this long and then rests. Every core computes, and where one core
# is late the whole batch is. (A lower priority instead would be worse: a thread that waits for a
# core while it holds the interpreter's lock holds up everybody.)
_WORK_S = 0.0003
_REST_S = 0.002
# A small image is there sooner than a step ends: the first so many seconds go without a rest.
_HEAD_START_S = 0.004


@dataclass(frozen=True, slots=True)
class Loaded:
    """How one load ended: with a layout, or with an error. image: when it was asked for."""

    load: Load
    layout: Layout | None
    seconds: float
    error: str | None = None
    image: Image | None = None


class Loader:
    """At most `threads` loads at a time.

    wake: called, on a loader thread, when one has ended. busy: whether batches run meanwhile.
    shard: what this rank has of each image; `shape` is the whole model's.
    """

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        arena: Arena,
        rank_max: int,
        threads: int,
        wake: Callable[[], None],
        busy: Callable[[], bool],
        shard: Shard = Shard(),
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._arena = arena
        self._rank_max = rank_max
        self._wake = wake
        self._busy = busy
        self._active = 0
        self._shard = shard
        self._lock = threading.Lock()
        self._done: SimpleQueue[Loaded] = SimpleQueue()
        self._bug: BaseException | None = None
        self._threads = ThreadPoolExecutor(threads, "adapter-loader")

    def begin(self, load: Load, image: Image | None, keep: bool) -> None:
        """image: what host memory holds of it. keep: give the image back, to be kept there."""
        self._threads.submit(self._run, load, image or self._room(load, keep), keep)

    def run(self, load: Load, image: Image | None, keep: bool) -> Loaded:
        """The same, while the caller waits."""
        held = image or self._room(load, keep)
        return self._threads.submit(self._load, load, held, keep, _no_pause).result()

    def ended(self) -> list[Loaded]:
        """The loads that ended since the last call. Raises what no load should: our own bugs."""
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

    def _room(self, load: Load, keep: bool) -> Piece | None:
        """Where an image that is to be kept is read to; None: where there is memory."""
        pool = self._arena.host_pool
        return pool.take(load.bytes) if keep and pool is not None else None

    def _run(self, load: Load, held: Image | Piece | None, keep: bool) -> None:
        self._count(1)
        try:
            self._done.put(self._load(load, held, keep, self._pauses()))
        except BaseException as bug:
            self._bug = bug
            raise
        finally:
            self._count(-1)
            self._wake()

    def _load(
        self,
        load: Load,
        held: Image | Piece | None,
        keep: bool,
        pause: Callable[[], None],
    ) -> Loaded:
        """held: the image, or where to read it to."""
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
            # Whatever one adapter's files or the device's memory do, only its requests suffer.
            return Loaded(load, None, time.monotonic() - start_s, str(error) or repr(error))

    def _read_in_place(self, load: Load, pause: Callable[[], None]) -> Layout:
        """Without a copy, and without memory that the system would have to give and take back."""
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
            shard=self._shard,
            pause=pause,
        )
        if image.digest != load.digest:
            raise AdapterFailed(f"{load.path}: the files changed since they were registered")
        assert image.bytes <= load.bytes, f"{image.bytes} bytes for a place of {load.bytes}"
        return image

    def _count(self, change: int) -> None:
        with self._lock:
            self._active += change

    def _pauses(self) -> Callable[[], None]:
        """To be called often while one load works: rests for as long as batches need the cores."""
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


def _no_pause() -> None:
    pass
