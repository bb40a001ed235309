"""Page-locked host memory for adapter images, taken once: locking pages while batches run would
hold them up.

A piece is free again when nobody refers to it any more: the host tier refers to the images it
keeps, a load to its own until the device has all of it.
"""

import itertools
import weakref
from collections import deque
from typing import Any

import torch

from cluster.errors import ConfigError
from replica.extents import Extents


class Piece:
    """memory: its bytes, flat."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory


class HostPool:
    """memory: flat, bytes. One thread takes pieces; any may let go of them."""

    def __init__(self, memory: torch.Tensor) -> None:
        assert memory.dtype == torch.uint8
        self._memory = memory
        self._extents = Extents(len(memory))
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
    """size: bytes; None of 0. Raises ConfigError when the system does not give that much."""
    if not size:
        return None
    try:
        memory = torch.empty(size, dtype=torch.uint8)
        # Not `pin_memory=True`, whose allocator takes the next power of two.
        with torch.cuda.device(device):
            status = int(_cudart().cudaHostRegister(memory.data_ptr(), size, _PORTABLE))
    except RuntimeError as error:
        raise ConfigError(f"host_memory: {size} bytes: {error}", field="host_memory") from error
    if status:
        raise ConfigError(
            f"host_memory: {size} bytes cannot be page-locked (cudaError {status})",
            field="host_memory",
        )
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
