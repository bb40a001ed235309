"""Device memory for adapter images, and the directory that says where each slot's matrices lie.

Beside a GPU's batches, images come on a stream of copies (`streams.py`). Bytes that batches may
still read, for they were queued before the bytes were given up, are guarded: a copy waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_kernels.ops import Lora
from lora_kernels.reference import Directory
from replica.adapters.host_pool import HostPool
from replica.adapters.image import PIECE_ELEMENTS, Image, Layout
from replica.adapters.streams import CopyStream, Event
from replica.model.shape import GROUPS, PROJECTIONS, ModelShape
from replica.scheduling.adapter import Slide

if TYPE_CHECKING:
    from lora_kernels.lora import TritonLora

ALIGNMENT_BYTES = 256
SLIDE_ELEMENTS = 2**20
# On a GPU each piece costs its launch, which is what the engine waits for.
QUEUED_SLIDE_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Place:
    """From now on rows of `slot` use the image at byte `offset`."""

    slot: int
    offset: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Clear:
    """The image of `slot` is gone."""

    slot: int


ArenaMessage = Place | Clear | Slide


class Arena:
    """`memory` is one flat tensor of the device's dtype. Slot 0 is the base model: rank 0, always.

    Which bytes are free is the scheduler's to know (`extents.py`); here it is only asserted that
    nothing lands on a placed image. Everything but `copy_in` and `writing` belongs to the engine's
    thread. tell: gets, first, each change that other ranks' arenas are to make as well.
    copies: None on CPU, where a step has run when it returns. host_pool: page-locked memory for
    images that are kept on the host, and are read to there.
    """

    alignment = ALIGNMENT_BYTES

    def __init__(
        self,
        shape: ModelShape,
        capacity_bytes: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        tell: Callable[[ArenaMessage], None] = lambda order: None,
        copies: CopyStream | None = None,
        host_pool: HostPool | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        """memory: that others use too, from which the scheduler takes what it gives to images; the
        capacity is then all of it.
        """
        if memory is not None:
            capacity_bytes = memory.nbytes
        self.host_pool = host_pool
        self._streams = copies
        self.capacity_bytes = capacity_bytes - capacity_bytes % ALIGNMENT_BYTES
        self._projections = list(shape.projections.values())
        # Not zeroed: pages of memory that no adapter has used yet cost nothing.
        if memory is None:
            size = self.capacity_bytes // dtype.itemsize
            memory = torch.empty(size, dtype=dtype, device=device)
        self.memory = memory
        self.directory = Directory(slots, shape.layers, len(PROJECTIONS))
        self._placed: dict[int, tuple[int, int]] = {}
        self._copies: list[tuple[int, int]] = []
        self._guards: list[tuple[tuple[int, int], Event]] = []
        self._arrived: dict[int, Event] = {}
        self._lock = threading.Lock()
        self._tell = tell

    def lora(self) -> Lora:
        """The operation that a runner adds deltas with; it follows the directory by itself."""
        return Lora(self.directory, self.memory, self._groups())

    def triton_lora(self, rank_max: int) -> TritonLora:
        """The same for a GPU, or for Triton's interpreter."""
        # Not everybody who runs on CPU has Triton.
        from lora_kernels.lora import TritonLora

        return TritonLora(self.directory, self.memory, self._groups(), rank_max)

    def _groups(self) -> list[list[tuple[int, int, int]]]:
        order = {name: index for index, name in enumerate(PROJECTIONS)}
        sizes = self._projections
        return [[(order[name], *sizes[order[name]]) for name in group] for group in GROUPS]

    @property
    def in_place(self) -> bool:
        """Whether `writing` gives memory that a thread of the CPU may fill."""
        return self._streams is None

    def copy_in(self, offset: int, image: Image, pause: Callable[[], None] = lambda: None) -> None:
        """The image's bytes to `offset` bytes. Runs on the loader's thread beside steps, until they
        are there.

        pause: called between the pieces that memory of the CPU is copied in.
        """
        assert image.flat.dtype == self.memory.dtype
        with self.writing(offset, image.bytes) as target:
            if self._streams is not None:
                after = self._guards_of((offset, image.bytes))
                locked = image.piece is not None
                arrived = self._streams.copy(target, image.flat, after, locked)
                arrived.synchronize()
                with self._lock:
                    self._arrived[offset] = arrived
                return
            for start in range(0, target.numel(), PIECE_ELEMENTS):
                piece = slice(start, start + PIECE_ELEMENTS)
                target[piece].copy_(image.flat[piece])
                pause()

    @contextmanager
    def writing(self, offset: int, bytes: int) -> Iterator[torch.Tensor]:
        """That much memory from `offset` bytes on, for a loader's thread to fill beside steps."""
        span = (offset, bytes)
        with self._lock:
            self._assert_free(span, list(self._placed.values()) + self._copies)
            self._copies.append(span)
        try:
            element = self.memory.element_size()
            yield self.memory[offset // element : (offset + bytes) // element]
        finally:
            with self._lock:
                self._copies.remove(span)

    def place(self, slot: int, offset: int, layout: Layout) -> None:
        """From now on rows of `slot` use the image at `offset` bytes."""
        self._tell(Place(slot, offset, layout))
        assert slot != 0, "slot 0 is the base model"
        assert slot not in self._placed, f"slot {slot} is taken"
        size = self._bytes(layout)
        with self._lock:
            self._assert_free((offset, size), list(self._placed.values()) + self._copies)
            self._placed[slot] = (offset, size)
            arrived = self._arrived.pop(offset, None)
        if arrived is not None and self._streams is not None:
            self._streams.arrived(arrived)
        start = offset // self.memory.element_size()
        self.directory.write(
            slot, start, layout.a_offset, layout.b_offset, layout.rank, layout.scale
        )

    def clear(self, slot: int) -> None:
        self._tell(Clear(slot))
        with self._lock:
            span = self._placed.pop(slot)
        self.directory.clear(slot)
        self.guard(*span)

    def guard(self, offset: int, bytes: int) -> None:
        """Whatever was queued until now may still use these bytes; a load into them waits for it.

        To be called too when bytes come to the arena that something else was kept in.
        """
        if self._streams is not None:
            event = self._streams.given_up()
            with self._lock:
                waiting = [(span, before) for span, before in self._guards if not before.query()]
                self._guards = [*waiting, ((offset, bytes), event)]

    def slide(self, slot: int, source: int, target: int, bytes: int) -> None:
        """Slides a placed image from byte `source` to `target`; the two may overlap."""
        self._tell(Slide(slot, source, target, bytes))
        size = self._placed[slot][1]
        assert self._placed[slot][0] == source and size <= bytes
        with self._lock:
            others = [span for other, span in self._placed.items() if other != slot]
            self._assert_free((target, size), others + self._copies)
            self._placed[slot] = (target, size)
        element = self.memory.element_size()
        span = (source // element, target // element, size // element)
        if self._streams is None:
            _slide(torch.Tensor.copy_, self.memory, *span, SLIDE_ELEMENTS)
        else:
            _slide(self._streams.slide, self.memory, *span, QUEUED_SLIDE_ELEMENTS)
        self.guard(source, size)
        self.directory.shift(slot, (target - source) // element)

    def _guards_of(self, span: tuple[int, int]) -> list[Event]:
        begin, end = span[0], span[0] + span[1]
        with self._lock:
            return [
                event
                for (offset, bytes), event in self._guards
                if begin < offset + bytes and offset < end
            ]

    def _assert_free(self, span: tuple[int, int], taken: list[tuple[int, int]]) -> None:
        begin, size = span
        assert begin % ALIGNMENT_BYTES == 0 and 0 <= begin <= self.capacity_bytes - size, span
        for other, length in taken:
            assert begin + size <= other or other + length <= begin, f"{span} lands on {other}"

    def _bytes(self, layout: Layout) -> int:
        widths = np.array([sum(sizes) for sizes in self._projections])
        return int((layout.rank * widths).sum()) * self.memory.element_size()


def _slide(
    copy: Callable[[torch.Tensor, torch.Tensor], object],
    memory: torch.Tensor,
    source: int,
    target: int,
    size: int,
    buffered: int,
) -> None:
    """Piece by piece from the end that the image moves towards. No piece is larger than the way it
    goes, but for small ways: then each goes through a buffer, `buffered` elements at a time.
    """
    distance = abs(target - source)
    most = max(distance, buffered)
    buffer = memory.new_empty(min(buffered, size) if distance < buffered else 0)
    starts = range(0, size, most)
    for start in starts if target < source else reversed(starts):
        length = min(most, size - start)
        piece = memory[source + start : source + start + length]
        if distance < length:
            copy(buffer[:length], piece)
            piece = buffer[:length]
        copy(memory[target + start : target + start + length], piece)
