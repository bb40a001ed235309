"""A fake device whose streams run late: two queues, and a rule for which one runs first."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from replica.adapters.streams import CopyStream, Event
from tests.until import TIMEOUT_S


class LateEvent:
    def __init__(self, device: "LateDevice") -> None:
        self.done = False
        self._device = device

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._device.run(lambda: self.done)


class LateStream:
    def __init__(self, device: "LateDevice") -> None:
        self._device = device
        self.work: deque[Callable[[], bool]] = deque()

    def wait(self, event: Event) -> None:
        self._put(event.query)

    def record(self) -> LateEvent:
        event = LateEvent(self._device)

        def complete() -> bool:
            event.done = True
            return True

        self._put(complete)
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype
        if self is self._device.copies:
            assert source.untyped_storage().data_ptr() in self._device.locked, "not page-locked"
        self.do(lambda: target.copy_(source))

    def do(self, work: Callable[[], object]) -> None:
        """Queues work, such as a forward."""

        def done() -> bool:
            work()
            return True

        self._put(done)

    def _put(self, work: Callable[[], bool]) -> None:
        with self._device.changed:
            self.work.append(work)
            self._device.changed.notify_all()


class _PromptStream(LateStream):
    """Runs work at once, as a CPU does."""

    def _put(self, work: Callable[[], bool]) -> None:
        assert work(), "a prompt stream cannot wait"


def copies_first(device: "LateDevice") -> list[LateStream]:
    return [device.copies, device.compute]


class LateDevice:
    """Runs work only while a caller waits for it.

    order: the streams in the order in which they are tried for each piece of work; a stream that
    it omits does not advance. prompt: only copies are late.
    """

    def __init__(
        self,
        order: Callable[["LateDevice"], Sequence[LateStream]] = copies_first,
        prompt: bool = False,
    ) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.compute = _PromptStream(self) if prompt else LateStream(self)
        self.copies = LateStream(self)
        self.order = order
        self.locked: set[int] = set()

    def lock(self, size: int) -> torch.Tensor:
        """Page-locked host memory. The device copies only from such memory."""
        memory = torch.empty(size, dtype=torch.uint8)
        self.locked.add(memory.untyped_storage().data_ptr())
        return memory

    def copy_stream(self, staging_bytes: int = 4096) -> CopyStream:
        staging = [self.lock(staging_bytes) for _ in range(2)]
        return CopyStream(self.compute, self.copies, staging)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Runs work until the condition is true; without one, until all work is done."""
        with self.changed:
            while not until():
                if not any(self._advance(stream) for stream in self.order(self)):
                    if not self.compute.work and not self.copies.work and not until():
                        return
                    assert self.changed.wait(TIMEOUT_S), "the queues wait for each other"

    def turn(self, order: Callable[["LateDevice"], Sequence[LateStream]]) -> None:
        with self.changed:
            self.order = order
            self.changed.notify_all()

    def _advance(self, stream: LateStream) -> bool:
        if not stream.work or not stream.work[0]():
            return False
        stream.work.popleft()
        self.changed.notify_all()
        return True
