"""Copies to the device beside what it computes, each waiting for the other where they touch.

    compute   ── forward n ── given up ── forward n+1 ──────────── arrived ── forward that names it
                                 └──────┐                             │
    copies    ──────────────────────── wait ── copy ── record ────────┤
    host                       source is filled │                     └ the load has ended, and the
                                                                        source may be filled anew

Everything is queued and runs later; only an event tells how far the device has come.
"""

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol, Self

import torch

# What is copied from memory that is not page-locked goes through pieces that are.
_STAGING_PIECES, _STAGING_BYTES = 4, 4 * 2**20
# Page-locked memory is copied in pieces too, so many times as large and as many at once: what else
# there is to copy waits for those that are queued, whatever the stream (see `host_reads`).
_LOCKED_TIMES = 8


class Event(Protocol):
    """A place in a queue."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """A queue of work; each call puts something at its end and returns at once."""

    def wait(self, event: Event) -> None:
        """What comes after waits until the event's queue has come to it."""

    def record(self) -> Event: ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Equally large, contiguous, of one dtype. Memory of the host is page-locked."""


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream.wait_event(event)

    def record(self) -> Event:
        # Whoever waits for it sleeps, instead of asking for it all the time.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)


class CopyStream:
    """The two queues of a device. Any thread may call `copy`; the rest is for the thread that puts
    forwards on `compute`.

    staging: pieces of page-locked memory, in bytes, for sources that are not; as many pieces of any
    source are queued at once.
    """

    def __init__(self, compute: Stream, copies: Stream, staging: Sequence[torch.Tensor]) -> None:
        self._compute = compute
        self._copies = copies
        self._pieces: SimpleQueue[tuple[torch.Tensor, Event | None]] = SimpleQueue()
        for piece in staging:
            self._pieces.put((piece, None))

    @classmethod
    def on(cls, device: torch.device) -> Self:
        """Beside the stream that is current here and now: forwards must go to that one."""
        with torch.cuda.device(device):
            return cls(
                CudaStream(torch.cuda.current_stream()),
                CudaStream(torch.cuda.Stream()),  # type: ignore[no-untyped-call]
                [
                    torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
                    for _ in range(_STAGING_PIECES)
                ],
            )

    def given_up(self) -> Event:
        """Comes when all that was put on the compute stream until now is done."""
        return self._compute.record()

    def slide(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Within the device, between the forwards before and those after."""
        self._compute.copy(target, source)

    def arrived(self, event: Event) -> None:
        """Forwards from now on wait for what `copy` returned."""
        self._compute.wait(event)

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event], locked: bool
    ) -> Event:
        """Comes when the bytes are there; until then `source` must stay as it is.

        Returns when the last pieces are on their way. after: the events of `given_up` for what the
        target held before. locked: the source is page-locked; else all of it has been read.
        """
        for event in after:
            self._copies.wait(event)
        arrived: Event | None = None
        start = 0
        try:
            while start < source.numel() or arrived is None:
                memory, left = self._pieces.get()
                try:
                    if left is not None:
                        left.synchronize()
                    staged = memory.view(source.dtype)
                    size = len(staged) * (_LOCKED_TIMES if locked else 1)
                    piece = source[start : start + size]
                    end = start + len(piece)
                    if not locked:
                        piece = staged[: len(piece)].copy_(piece)
                    self._copies.copy(target[start:end], piece)
                    arrived = left = self._copies.record()
                    start = end
                finally:
                    self._pieces.put((memory, left))
        except BaseException:
            # Whoever gets the target next may write it from elsewhere.
            if arrived is not None:
                arrived.synchronize()
            raise
        return arrived
