"""Device memory for adapter images, and the directory of each slot's matrices.

On a GPU, images arrive on a copy stream while batches run (`streams.py`). Batches that are already
queued may still read freed bytes. A guard on those bytes makes the next copy wait for the batches.
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
from replica.adapters.image import Image, Layout
from replica.adapters.streams import CopyStream, Event
from replica.model.shape import Shape
from replica.scheduling.adapter import Slide

if TYPE_CHECKING:
    from lora_kernels.lora import TritonLora

ALIGNMENT_BYTES = 256
PIECE_ELEMENTS = 2**17
SLIDE_ELEMENTS = 2**20
# Larger on a GPU, where the engine waits for the launch of each piece.
QUEUED_SLIDE_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of `slot` use the image at byte `offset` from now on."""

    slot: int
    offset: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Clear:
    """Rows of `slot` use no adapter from now on."""

    slot: int


ArenaMessage = Place | Clear | Slide


class Arena:
    """`memory` is one flat tensor of the engine's dtype. Slot 0 is the base model, with rank 0.

    The scheduler decides which bytes are free (`extents.py`). The arena only asserts that images do
    not overlap. Call it on the engine's thread, except for `copy_in` and `writing`.

    tell: called before each change, to send it to other ranks.
    copies: None on a CPU, where a step has ended when it returns.
    host_pool: page-locked memory for images that are kept on the host.
    """

    alignment = ALIGNMENT_BYTES

    def __init__(
        self,
        shape: Shape,
        capacity_bytes: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        tell: Callable[[ArenaMessage], None] = lambda message: None,
        copies: CopyStream | None = None,
        host_pool: HostPool | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        """memory: shared with KV pages; the scheduler decides which bytes images take. Replaces
        capacity_bytes. None: allocates its own.
        """
        if memory is not None:
            capacity_bytes = memory.nbytes
        self.host_pool = host_pool
        self._streams = copies
        self.capacity_bytes = capacity_bytes - capacity_bytes % ALIGNMENT_BYTES
        self._projections = list(shape.projections.values())
        index = {name: i for i, name in enumerate(shape.projections)}
        self._groups = [
            [(index[name], *shape.projections[name]) for name in group] for group in shape.groups
        ]
        # Not zeroed: the system allocates pages on the first write.
        if memory is None:
            size = self.capacity_bytes // dtype.itemsize
            memory = torch.empty(size, dtype=dtype, device=device)
        self.memory = memory
        self.directory = Directory(slots, shape.layers, len(self._projections))
        self._placed: dict[int, tuple[int, int]] = {}
        self._copies: list[tuple[int, int]] = []
        self._guards: list[tuple[tuple[int, int], Event]] = []
        self._arrived: dict[int, Event] = {}
        self._lock = threading.Lock()
        self._tell = tell

    def lora(self) -> Lora:
        """The operation that adds deltas. It follows changes of the directory."""
        return Lora(self.directory, self.memory, self._groups)

    def triton_lora(self, rank_max: int) -> TritonLora:
        """The same with Triton kernels."""
        # Triton may be missing on a CPU.
        from lora_kernels.lora import TritonLora

        return TritonLora(self.directory, self.memory, self._groups, rank_max)

    @property
    def in_place(self) -> bool:
        """True if a CPU thread can fill the memory that `writing` gives."""
        return self._streams is None

    def copy_in(self, offset: int, image: Image, pause: Callable[[], None] = lambda: None) -> None:
        """Copies the image to byte `offset`, and returns when it has arrived. Runs on a loader's
        thread while batches run.

        pause: called between pieces of a copy on a CPU.
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
        """Memory from byte `offset` that a loader's thread fills while batches run."""
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
        """Rows of `slot` use the image at byte `offset` from now on."""
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
            slot,
            start,
            layout.a_offset,
            layout.b_offset,
            layout.rank,
            layout.scale,
            layout.gain_offset,
            layout.vocabulary,
        )

    def clear(self, slot: int) -> None:
        self._tell(Clear(slot))
        with self._lock:
            span = self._placed.pop(slot)
        self.directory.clear(slot)
        self.guard(*span)

    def guard(self, offset: int, bytes: int) -> None:
        """Makes a later load into these bytes wait for all work queued until now.

        Also call it for bytes that the arena takes over from KV pages.
        """
        if self._streams is not None:
            event = self._streams.given_up()
            with self._lock:
                waiting = [(span, before) for span, before in self._guards if not before.query()]
                self._guards = [*waiting, ((offset, bytes), event)]

    def slide(self, slot: int, source: int, target: int, bytes: int) -> None:
        """Moves a placed image from byte `source` to `target`. The ranges may overlap."""
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
        elements = int((layout.rank * widths).sum())
        if layout.gain_offset is not None:
            outputs = np.array([outputs for _, outputs in self._projections])
            elements += 2 * int(((layout.gain_offset > 0) * outputs).sum())
        elements += sum(delta.elements for delta in layout.vocabulary)
        return elements * self.memory.element_size()


def _slide(
    copy: Callable[[torch.Tensor, torch.Tensor], object],
    memory: torch.Tensor,
    source: int,
    target: int,
    size: int,
    buffered: int,
) -> None:
    """Copies in pieces, starting at the end that the image moves towards. A piece no longer than
    the distance cannot overlap its target. For a short distance, pieces of `buffered` elements go
    through a buffer.
    """
    distance = abs(target - source)
    length_max = max(distance, buffered)
    buffer = memory.new_empty(min(buffered, size) if distance < buffered else 0)
    starts = range(0, size, length_max)
    for start in starts if target < source else reversed(starts):
        length = min(length_max, size - start)
        piece = memory[source + start : source + start + length]
        if distance < length:
            copy(buffer[:length], piece)
            piece = buffer[:length]
        copy(memory[target + start : target + start + length], piece)
