"""Page-locked host memory for adapter images, taken once: locking pages while batches run would
hold them up.

A piece is free again when nobody refers to it any more: the host tier refers to the images it
keeps, a load to its own until the device has all of it.
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

# As often as less is tried when the system does not lock as much as is wanted. Images beyond the
# pool leave the host, so that much less would be worse than memory that is not locked.
_HALVINGS = 3


class Piece:
    """memory: its bytes, flat."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory


class HostPool:
    """memory: flat, bytes. One thread takes pieces; any may let go of them."""

    def __init__(self, memory: torch.Tensor) -> None:
        assert memory.dtype == torch.uint8
        self._memory = memory
        self.size = len(memory)
        self._extents = Extents(self.size)
        self._numbers = itertools.count()
        # A finalizer runs anywhere, in the middle of `take` too: what it lets go of is queued.
        self._let_go: deque[str] = deque()

    def fits(self, size: int) -> bool:
        self._collect()
        return self._extents.copy().take("", size) is not None

    def take(self, size: int) -> Piece | None:
        """None when no hole is large enough."""
        self._collect()
        name = str(next(self._numbers))
        offset = self._extents.take(name, size)
        if offset is None:
            return None
        piece = Piece(self._memory[offset : offset + size])
        weakref.finalize(piece, self._let_go.append, name)
        return piece

    def check(self) -> None:
        self._collect()
        self._extents.check()

    @property
    def free(self) -> int:
        self._collect()
        return self._extents.free

    def _collect(self) -> None:
        while self._let_go:
            self._extents.give_back(self._let_go.popleft())


def locked_pool(size: int, device: torch.device) -> HostPool | None:
    """size: bytes. Smaller where the system does not lock that much; None where it locks too little
    to be of use: images then lie wherever there is memory, and are copied in pieces.
    """
    for given in [size >> halving for halving in range(_HALVINGS + 1)]:
        if not given:
            break
        pool = _locked(given, device)
        if pool is not None:
            if given < size:
                log.warning("host_memory: %d of %d bytes are page-locked", given, size)
            return pool
    if size:
        log.warning("host_memory: of %d bytes none is page-locked, so loads take longer", size)
    return None


def _locked(size: int, device: torch.device) -> HostPool | None:
    try:
        memory = torch.empty(size, dtype=torch.uint8)
        # Not `pin_memory=True`, whose allocator takes the next power of two.
        with torch.cuda.device(device):
            status = int(_cudart().cudaHostRegister(memory.data_ptr(), size, _PORTABLE))
    except (RuntimeError, MemoryError) as error:
        log.warning("host_memory: %d bytes: %s", size, error)
        return None
    if status:
        log.warning("host_memory: %d bytes cannot be page-locked (cudaError %d)", size, status)
        # CUDA would tell of it again at the next launch.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
        return None
    pool = HostPool(memory)
    # Kept by the finalizer: the memory must not go before it is unlocked.
    weakref.finalize(pool, _unlock, memory).atexit = False
    return pool


# Locked for every context of the process.
_PORTABLE = 1


def _unlock(memory: torch.Tensor) -> None:
    _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
