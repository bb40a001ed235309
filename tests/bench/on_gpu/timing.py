"""Times on the device: events around replays of a captured graph, with the cache flushed between.

On a CPU, where this only shows that it runs, the host's clock around plain calls.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.bench.on_gpu.figures import median
from tests.bench.on_gpu.floors import Rates

# Longer than the host takes to enqueue what is measured, and several times the largest cache.
_FLUSH_BYTES = 2**29


@dataclass(slots=True)
class Timer:
    """repeats: how often each measurement is taken."""

    device: torch.device
    repeats: int
    _flushed: torch.Tensor | None = field(default=None, repr=False)

    def seconds(
        self, run: Callable[[], object], capture: bool = True, pieces: int = 1
    ) -> list[float]:
        """Of each repeat. capture: through a graph, so that no launch is waited for. pieces: how
        many alike `run` does; a small kernel alone takes no longer than its graph does to start.
        """
        if self.device.type != "cuda":
            run()
            return [host_s(run) / pieces for _ in range(self.repeats)]
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        timed = self._captured(run) if capture else run
        timed()
        if self._flushed is None:
            self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)
        events = [_events() for _ in range(self.repeats)]
        for begin, end in events:
            self._flushed.zero_()
            begin.record()
            timed()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 / pieces for begin, end in events]

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """As it is where it cannot be captured, for it waits for the device somewhere."""
        # What it needs, not every machine with this bench's tests has.
        from replica.model.graphs import CudaCapture

        def work() -> None:
            run()

        try:
            return CudaCapture(self.device)(work)
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"not captured, timed call by call: {str(error).splitlines()[0][:160]}")
            return run

    def rates(self, tiny: bool) -> Rates:
        """The ceilings everything is compared with, on random numbers."""
        bytes, side = (2**22, 128) if tiny else (2**32, 8192)
        dtype = torch.float32 if tiny else torch.bfloat16
        source = torch.randint(0, 127, (bytes,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        matrix, copied = (held.view(dtype).view(-1, 1024) for held in (source, target))
        vector = torch.ones(1024, dtype=dtype, device=self.device)
        # Whichever of torch's ways is faster: a plain copy may be left to a copy engine.
        copies: list[Callable[[], object]] = [
            lambda: target.copy_(source),
            lambda: torch.neg(matrix, out=copied),
        ]
        reads: list[Callable[[], object]] = [lambda: torch.mv(matrix, vector), matrix.sum]
        copy_s, read_s = (min(median(self.seconds(way)) for way in w) for w in (copies, reads))
        host = torch.empty(bytes // 16, dtype=torch.int8, pin_memory=self.device.type == "cuda")
        host.copy_(source[: len(host)])
        part = target[: len(host)]
        copy_in_s = median(self.seconds(lambda: part.copy_(host, non_blocking=True), capture=False))
        a, b = (torch.randn(side, side, dtype=dtype, device=self.device) for _ in range(2))
        out = torch.empty_like(a)
        matmul_s = median(self.seconds(lambda: torch.mm(a, b, out=out)))
        flop_per_s, copy_in_per_s = 2 * side**3 / matmul_s, len(host) / copy_in_s
        return Rates(2 * bytes / copy_s, bytes / read_s, flop_per_s, copy_in_per_s)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def host_s(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


@dataclass(slots=True)
class Spans:
    """When pieces of work ran on the device's own clock, in seconds since `start`.

    `begin` and `end` enqueue a mark each; `read` waits for the device.
    """

    device: torch.device
    _marks: list[tuple[object, object]] = field(default_factory=list)
    _first: object = None

    def start(self) -> None:
        self._marks.clear()
        self._first = self.mark()

    def mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, run: Callable[[], object]) -> object:
        begin = self.mark()
        try:
            return run()
        finally:
            self._marks.append((begin, self.mark()))

    def last_end(self) -> torch.cuda.Event:
        """The mark after the last piece of work."""
        mark = self._marks[-1][1]
        assert isinstance(mark, torch.cuda.Event)
        return mark

    def since_start(self, mark: object) -> float:
        if isinstance(self._first, torch.cuda.Event) and isinstance(mark, torch.cuda.Event):
            return self._first.elapsed_time(mark) / 1e3
        assert isinstance(mark, float) and isinstance(self._first, float)
        return mark - self._first

    def read(self) -> list[tuple[float, float]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [(self.since_start(b), self.since_start(e)) for b, e in self._marks]
