"""Captures a decode step for each bucket of rows, and replays it over buffers filled in place."""

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
"""Turns work over fixed buffers into a function that repeats it on their current content."""


def buckets(rows_max: int) -> list[int]:
    """1, 2, 4, multiples of 8, and the largest batch."""
    return [rows for rows in (1, 2, 4, *range(8, rows_max, 8)) if rows < rows_max] + [rows_max]


def keep(work: Work) -> Work:
    """The capture on a device without graphs: it returns the work itself."""
    return work


class CudaCapture:
    """Captures CUDA graphs on one stream with one memory pool. Graphs never run concurrently, so
    smaller graphs reuse the intermediates' memory of a larger one captured before.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Once without a capture, which must not compile kernels or create library handles.
            work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            # thread_local: calls of other threads must not invalidate the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except BaseException:
            self._abandon(graph, current)
            raise
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """Cleans up after an invalid capture: torch leaves its stream current and its pool open."""
        torch.cuda.set_stream(current)
        # Torch's allocators still refer to the graph.
        _ABANDONED.append(graph)
        with contextlib.suppress(RuntimeError):  # torch may have closed the pool already
            torch._C._cuda_endAllocateToPool(current.device_index, self._pool)


_ABANDONED: list[torch.cuda.CUDAGraph] = []


class Captured(IntEnum):
    """How decode steps were captured when the engine started."""

    AS_CONFIGURED = 0
    WITHOUT_SHRINK_STREAM = 1
    NOT_AT_ALL = 2


class Capturing(Protocol):
    """An executor whose decode steps can be captured. capture: changes nothing if it raises."""

    def capture(self, capture: Capture) -> None: ...

    def shrink_in_line(self) -> None:
        """Runs LoRA's shrink on the main stream from now on."""


def capture_what_can_be(steps: Capturing, device: torch.device) -> Captured:
    """Captures decode steps, and falls back to a slower way on any error, with a warning. Raises
    StartupError if an error makes CUDA unusable.
    """
    for captured, fallback in (
        (Captured.AS_CONFIGURED, "without the shrink's own stream"),
        (Captured.WITHOUT_SHRINK_STREAM, "kernel by kernel, without CUDA graphs"),
    ):
        try:
            # A new capture for each try: the failed one may be in a bad state.
            steps.capture(CudaCapture(device) if device.type == "cuda" else keep)
            return captured
        except Exception as error:
            log.warning(
                "decode steps cannot be captured, so they run %s: %s",
                fallback,
                error,
                exc_info=True,
            )
        if device.type == "cuda":
            _recover(device)
        steps.shrink_in_line()
    return Captured.NOT_AT_ALL


def _recover(device: torch.device) -> None:
    """Clears the errors of a failed capture. Raises StartupError if CUDA stays unusable."""
    try:
        # The next launch reports a pending error and thereby clears it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).cpu()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise StartupError(
            f"CUDA is unusable since a capture failed; only a new process can use it again "
            f"(cuda_graphs: false captures nothing): {error}"
        ) from error


class DecodeGraphs:
    """Captured steps in which every row is one token, with LoRA and without.

    A capture reads its inputs from `table` and from one buffer for the largest batch. A replay
    reads whatever rows, lengths and carried tokens they contain then.
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
        """Captures all buckets over padding rows.

        step: computes inputs with LoRA or without, and writes its results to fixed buffers.
        begin_lora: prepares LoRA for a number of rows. It is not captured.
        """
        lists = self._layout.cut(self._buffer)
        for rows in reversed(self.buckets):
            inputs = decode_inputs(rows, lists, self._table)
            begin_lora(rows)
            for lora in (True, False):
                self._replays[rows, lora] = capture(partial(step, inputs, lora))

    def bucket(self, rows: int) -> int:
        """Number of rows that a batch of `rows` is padded to."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def replay(self, packed: PackedRows, lora: bool) -> None:
        rows = self.bucket(len(packed.rows))
        packed.to_device(self._table, self._layout, rows, self._buffer)
        self._replays[rows, lora]()
