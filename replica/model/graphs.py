"""Decode steps captured once a bucket of rows, replayed over buffers that are written in place."""

import contextlib
import logging
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Protocol

import torch

from cluster.errors import StartupError
from replica.model.paged_batch import (
    BufferLayout,
    Inputs,
    PackedRows,
    PageTable,
    decode_inputs,
    padding,
)

log = logging.getLogger(__name__)

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Makes of work over fixed buffers a function that does it again, whatever they hold by then."""


def buckets(rows_max: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and the largest batch itself."""
    return [rows for rows in (1, 2, 4, *range(8, rows_max, 8)) if rows < rows_max] + [rows_max]


def keep(work: Work) -> Work:
    """The capture of a device without graphs: the same work, over the same buffers."""
    return work


class CudaCapture:
    """CUDA graphs from one stream, their memory from one pool: they never run at once, so what a
    large one needs in between serves the smaller ones that are captured after it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # A capture must neither compile a kernel nor make a library's handle or workspace.
            work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            # Of this thread's calls only: what other threads do meanwhile must not spoil it.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except BaseException:
            self._abandon(graph, current)
            raise
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """CUDA has ended a capture that it is not content with; torch then leaves the capture's
        stream current, and its pool open.
        """
        torch.cuda.set_stream(current)
        # Torch's allocators still ask it which stream it captured.
        _ABANDONED.append(graph)
        with contextlib.suppress(RuntimeError):  # then torch had got as far as that
            torch._C._cuda_endAllocateToPool(current.device_index, self._pool)


_ABANDONED: list[torch.cuda.CUDAGraph] = []


class Captured(IntEnum):
    """What decode steps came to when the engine started."""

    AS_CONFIGURED = 0
    WITHOUT_SHRINK_STREAM = 1
    NOT_AT_ALL = 2


class Capturing(Protocol):
    """Whose decode steps are captured. capture: changes nothing where it raises."""

    def capture(self, capture: Capture) -> None: ...

    def shrink_in_line(self) -> None:
        """From now on LoRA uses no stream of its own."""


def capture_what_can_be(steps: Capturing, device: torch.device) -> Captured:
    """Slow is better than not at all, so any error counts, and is said. Raises StartupError where
    CUDA is lost after one.
    """
    for captured, less in (
        (Captured.AS_CONFIGURED, "without the shrink's own stream"),
        (Captured.WITHOUT_SHRINK_STREAM, "kernel by kernel, without CUDA graphs"),
    ):
        try:
            # A new one each time: nothing is shared with one that failed.
            steps.capture(CudaCapture(device) if device.type == "cuda" else keep)
            return captured
        except Exception as error:
            log.warning(
                "decode steps cannot be captured, so they run %s: %s", less, error, exc_info=True
            )
        if device.type == "cuda":
            _settle(device)
        steps.shrink_in_line()
    return Captured.NOT_AT_ALL


def _settle(device: torch.device) -> None:
    """Leaves a failed capture behind. Raises StartupError where CUDA is lost to this process."""
    try:
        # An error that nobody has asked for yet comes with the next launch, and goes with it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).cpu()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise StartupError(
            f"CUDA is lost to this process since a capture failed, and only a new process gets it "
            f"back (cuda_graphs: false captures nothing): {error}"
        ) from error


class DecodeGraphs:
    """Steps in which every row is one token, in two families: base only, and with LoRA.

    All that a capture reads lies in `table` and in a buffer made here, as large as the largest
    batch, so that a replay takes other rows, lengths and carried tokens than were there then.
    """

    def __init__(self, rows_max: int, table: PageTable) -> None:
        self.buckets = buckets(rows_max)
        self._table = table
        self._layout = BufferLayout(rows_max, rows_max)
        self._buffer = padding(table, self._layout)
        self._replays: dict[tuple[int, bool], Work] = {}

    def capture(
        self,
        step: Callable[[Inputs, bool], None],
        begin_lora: Callable[[int], None],
        capture: Capture,
    ) -> None:
        """step: computes inputs with LoRA or without, and leaves what comes out in buffers too.
        begin_lora: makes LoRA ready for so many rows, which is no part of the step.

        Captures compute rows that only pad.
        """
        lists = self._layout.cut(self._buffer)
        for rows in reversed(self.buckets):
            inputs = decode_inputs(rows, lists, self._table)
            begin_lora(rows)
            for lora in (True, False):
                self._replays[rows, lora] = capture(partial(step, inputs, lora))

    def bucket(self, rows: int) -> int:
        """How many rows a batch of so many is padded to."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def replay(self, packed: PackedRows, lora: bool) -> None:
        rows = self.bucket(len(packed.rows))
        packed.to_device(self._table, self._layout, rows, self._buffer)
        self._replays[rows, lora]()
