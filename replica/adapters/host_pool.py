"""Page-locked host memory for adapter images, allocated once, because locking pages stalls batches.

A piece is free again when its last reference is gone. The host tier refers to the images it keeps;
a load refers to its image until the device has all of it.
"""

import contextlib
import itertools
import logging
import weakref
from collections import deque
from typing import Any

import torch

from replica.scheduling.extents import Extents

log = logging.getLogger(__name__)

# So often the size is halved if the system cannot lock it. Images beyond the pool leave the host,
# so a much smaller pool would be worse than unlocked memory.
_HALVINGS = 3


class Piece:
    """memory: flat, bytes."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory


class HostPool:
    """memory: flat, bytes. One thread takes pieces; any thread may drop them."""

    def __init__(self, memory: torch.Tensor) -> None:
        assert memory.dtype == torch.uint8
        self._memory = memory
        self.size = len(memory)
        self._extents = Extents(self.size)
        self._numbers = itertools.count()
        # A finalizer may run at any time, even within `take`, so freed pieces are queued.
        self._freed: deque[str] = deque()

    def fits(self, size: int) -> bool:
        self._collect()
        return self._extents.hole(size) is not None

    def take(self, size: int) -> Piece | None:
        """None if no hole is large enough."""
        self._collect()
        name = str(next(self._numbers))
        offset = self._extents.take(name, size)
        if offset is None:
            return None
        piece = Piece(self._memory[offset : offset + size])
        weakref.finalize(piece, self._freed.append, name)
        return piece

    def check(self) -> None:
        self._collect()
        self._extents.check()

    @property
    def free(self) -> int:
        self._collect()
        return self._extents.free

    def _collect(self) -> None:
        while self._freed:
            self._extents.give_back(self._freed.popleft())


def locked_pool(size: int, device: torch.device) -> HostPool | None:
    """A pool of `size` bytes, or a smaller one if the system cannot lock that much. None if it can
    lock too little: images are then in unlocked memory and are copied in pieces.
    """
    for attempt in [size >> halving for halving in range(_HALVINGS + 1)]:
        if not attempt:
            break
        pool = _locked(attempt, device)
        if pool is not None:
            if attempt < size:
                log.warning("host_memory: only %d of %d bytes are page-locked", attempt, size)
            return pool
    if size:
        log.warning("host_memory: %d bytes cannot be page-locked, so loads take longer", size)
    return None


def _locked(size: int, device: torch.device) -> HostPool | None:
    try:
        memory = torch.empty(size, dtype=torch.uint8)
        # `pin_memory=True` would round the size up to a power of two.
        with torch.cuda.device(device):
            status = int(_cudart().cudaHostRegister(memory.data_ptr(), size, _PORTABLE))
    except (RuntimeError, MemoryError) as error:
        log.warning("host_memory: %d bytes: %s", size, error)
        return None
    if status:
        log.warning("host_memory: %d bytes cannot be page-locked (cudaError %d)", size, status)
        # Clears the error, which CUDA would report again at the next launch.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
        return None
    pool = HostPool(memory)
    # The finalizer refers to the memory, which must be unlocked before it is freed.
    weakref.finalize(pool, _unlock, memory).atexit = False
    return pool


# cudaHostRegisterPortable: locked for every CUDA context of the process.
_PORTABLE = 1


def _unlock(memory: torch.Tensor) -> None:
    _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
