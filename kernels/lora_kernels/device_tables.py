"""The kernels' lookup tables: device memory at a fixed address, filled from the CPU."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lora_kernels.host_reads import fetch
from lora_kernels.reference import Directory

ENTRY = 8
"""int32 values an entry: offsets of A, B and the gains as int64, in units; the rank; the scale as
float32."""
RANK, SCALE = 6, 7
"""Where the last two are."""


class DeviceDirectory:
    """A copy of the directory on the device. `follow` updates it.

    `offsets`, `ranks` and `scales` view one tensor [slots, layers, projections, entry] as int64,
    int32 and float32. unit: every offset is a multiple of this many arena elements.

    `highest` [slots]: each slot's highest rank at its last `follow`.
    """

    def __init__(
        self, directory: Directory, device: torch.device, unit: int, rank_max: int
    ) -> None:
        self._directory = directory
        self._unit = unit
        self._rank_max = rank_max
        size = (*directory.rank.shape, ENTRY)
        self.ranks = torch.zeros(size, dtype=torch.int32, device=device)
        self.offsets = self.ranks.view(torch.int64)
        self.scales = self.ranks.view(torch.float32)
        self.highest = np.zeros(size[0], np.int32)
        self._followed = np.zeros(size[0], np.int64)
        self._staged = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = event() if device.type == "cuda" else None

    def follow(self, slots: Sequence[int]) -> None:
        """Copies those of `slots` that changed since their last `follow`, on the current stream."""
        generations = self._directory.generation
        stale = [slot for slot in slots if self._followed[slot] != generations[slot]]
        if not stale:
            return
        if self._copied is not None:
            # The previous copy may still be reading the staging buffer.
            self._copied.synchronize()
        for slot in stale:
            self._stage(slot)
            fetch(self.ranks[slot].view(-1), self._staged[slot].view(-1))
            self._followed[slot] = generations[slot]
        if self._copied is not None:
            self._copied.record()

    def check(self) -> None:
        """Asserts that every slot unchanged since its last `follow` equals the directory."""
        unchanged = self._directory.generation == self._followed
        for slot in np.flatnonzero(unchanged).tolist():
            rank = self._directory.rank[slot]
            assert self.highest[slot] == rank.max()
            entries = self.ranks[slot].cpu()
            assert np.array_equal(entries[..., RANK].numpy(), rank)
            offsets = entries.view(torch.int64).numpy() * self._unit
            used = rank > 0
            assert np.array_equal(offsets[used][:, 0], self._directory.a_offset[slot][used])
            assert np.array_equal(offsets[used][:, 1], self._directory.b_offset[slot][used])
            assert np.array_equal(offsets[used][:, 2], self._directory.gain_offset[slot][used])

    def _stage(self, slot: int) -> None:
        directory = self._directory
        rank = directory.rank[slot]
        used = rank > 0
        places = (directory.a_offset, directory.b_offset, directory.gain_offset)
        offsets = np.stack([place[slot] for place in places], -1)
        assert not (offsets[used] % self._unit).any(), f"slot {slot}: unaligned offset"
        assert rank.max() <= self._rank_max, f"slot {slot}: rank {rank.max()}"
        staged = self._staged[slot]
        staged.view(torch.int64).numpy()[..., :3] = np.where(used[..., None], offsets, 0)
        staged.view(torch.int64).numpy()[..., :3] //= self._unit
        staged.numpy()[..., RANK] = rank
        staged.view(torch.float32).numpy()[..., SCALE] = directory.scale[slot]
        self.highest[slot] = rank.max()


class DeviceTable:
    """int32 values on the device. `next` returns a host array to fill; `send` copies it over.

    Two host buffers alternate, so the CPU can prepare a step while the previous step's copy waits
    for the device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.values = torch.zeros(size, dtype=torch.int32, device=device)
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._copied = [event() for _ in range(2)] if on_gpu else None
        self._turn = 0

    def next(self) -> npt.NDArray[np.int32]:
        self._turn ^= 1
        if self._copied is not None:
            self._copied[self._turn].synchronize()
        array: npt.NDArray[np.int32] = self._buffers[self._turn].numpy()
        return array

    def send(self, used: int) -> None:
        """Copies the first `used` values of the array from `next`, on the current stream."""
        fetch(self.values[:used], self._buffers[self._turn][:used])
        if self._copied is not None:
            self._copied[self._turn].record()


def offset_unit(groups: Sequence[Sequence[tuple[int, int, int]]]) -> int:
    """The largest unit, up to 16 elements, that divides every offset of A and B.

    Images are aligned to more than 16 elements, and A and B consist of whole rows.
    """
    widths = [width for group in groups for _, *widths in group for width in widths]
    return math.gcd(16, *widths)


def event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
