"""Copies to the device while it computes. Copies and forwards wait for each other by events.

    compute   ── forward n ── given up ── forward n+1 ──────────── arrived ── forward that uses it
                                 └──────┐                             │
    copies    ──────────────────────── wait ── copy ── record ────────┤
    host                       source is filled │                     └ the load has ended; the
                                                                        source may be reused

Calls only queue work. An event tells when the device has done it.
"""

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol, Self

import torch

# Unlocked memory is copied through page-locked staging pieces.
_STAGING_PIECES, _STAGING_BYTES = 4, 4 * 2**20
# Page-locked memory is copied in pieces of so many times the size. The number of queued pieces is
# bounded, because copies on any stream wait for those queued before (see `host_reads`).
_LOCKED_TIMES = 8


class Event(Protocol):
    """A position in a queue of work."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """A queue of work. Each call appends to it and returns at once."""

    def wait(self, event: Event) -> None:
        """Later work waits for the event."""

    def record(self) -> Event: ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Tensors of equal size and dtype, contiguous. Host memory must be page-locked."""


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream.wait_event(event)

    def record(self) -> Event:
        # blocking: a thread that waits for it sleeps instead of polling.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)


class CopyStream:
    """The two queues of a device. Any thread may call `copy`. Call the rest on the thread that
    queues forwards on `compute`.

    staging: page-locked pieces, in bytes, for unlocked sources. Their number also bounds the pieces
    of any source that are queued at once.
    """

    def __init__(self, compute: Stream, copies: Stream, staging: Sequence[torch.Tensor]) -> None:
        self._compute = compute
        self._copies = copies
        self._pieces: SimpleQueue[tuple[torch.Tensor, Event | None]] = SimpleQueue()
        for piece in staging:
            self._pieces.put((piece, None))

    @classmethod
    def on(cls, device: torch.device, piece_bytes: int = _STAGING_BYTES) -> Self:
        """Takes the current stream for `compute`: forwards must run on it.

        piece_bytes: of one staging piece.
        """
        with torch.cuda.device(device):
            return cls(
                CudaStream(torch.cuda.current_stream()),
                CudaStream(torch.cuda.Stream()),  # type: ignore[no-untyped-call]
                [
                    torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=True)
                    for _ in range(_STAGING_PIECES)
                ],
            )

    def given_up(self) -> Event:
        """An event after all work queued on the compute stream until now."""
        return self._compute.record()

    def slide(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies within the device, between the forwards queued before and after."""
        self._compute.copy(target, source)

    def arrived(self, event: Event) -> None:
        """Later forwards wait for the event that `copy` returned."""
        self._compute.wait(event)

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event], locked: bool
    ) -> Event:
        """Returns the event of the copy's end, once all pieces are queued.

        after: events of `given_up` for the target's bytes. locked: the source is page-locked and
        must not change before the event. An unlocked source has been read on return.
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
            # Waits for queued pieces, because the target may be reused after the error.
            if arrived is not None:
                arrived.synchronize()
            raise
        return arrived
