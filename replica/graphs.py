"""Decode steps captured once a bucket of rows, replayed over buffers that are written in place."""

from collections.abc import Callable
from functools import partial

import torch

from replica.paged_batch import Inputs, PackedRows, PageTable, Room, decode_inputs, padding

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
        # Of this thread's calls only: what other threads do meanwhile must not spoil it.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay


class DecodeGraphs:
    """Steps in which every row is one token, in two families: base only, and with LoRA.

    All that a capture reads lies in `table` and in a buffer made here, as large as the largest
    batch, so that a replay takes other rows, lengths and carried tokens than were there then.
    """

    def __init__(self, rows_max: int, table: PageTable) -> None:
        self.buckets = buckets(rows_max)
        self._table = table
        self._room = Room(rows_max, rows_max)
        self._buffer = padding(table, self._room)
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
        lists = self._room.cut(self._buffer)
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
        packed.to_device(self._table, self._room, rows, self._buffer)
        self._replays[rows, lora]()
