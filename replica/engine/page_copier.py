"""Copies KV pages between the device and host memory, as plans say.

On CUDA each direction has a thread and a stream of its own, so that copies run beside batches:

    engine   batch n ── event ────────────── batch n+1 ────── … ── ended ── batch that uses them
                          └──────┐                                   │
    thread                     waits ── queues pieces ── waits ──────┘

Elsewhere `begin` copies before it returns.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from replica.adapters.streams import CopyStream, Event
from replica.scheduling.pages import PageCopy


class Copied(NamedTuple):
    """A copy that is done. seconds: without its wait for batches and for other copies."""

    copy: PageCopy
    bytes: int
    seconds: float


class PageCopier:
    """pages, host: the pages of the device and of host memory, by their index in dimension `dim`.

    streams: to the host and back; None copies on the calling thread. With streams `dim` is 0, and
        host memory is page-locked.
    wake: called on any thread when a copy has ended.
    """

    def __init__(
        self,
        pages: torch.Tensor,
        host: torch.Tensor,
        dim: int,
        wake: Callable[[], None],
        streams: tuple[CopyStream, CopyStream] | None = None,
    ) -> None:
        assert streams is None or dim == 0
        self._pages = pages
        self._host = host
        self._dim = dim
        self._wake = wake
        self._page_bytes = pages.select(dim, 0).numel() * pages.element_size()
        self._streams = streams
        self._threads = [ThreadPoolExecutor(1, "page-copies") for _ in streams or ()]
        self._begun: dict[int, tuple[PageCopy, Future[float]]] = {}

    def begin(self, copy: PageCopy) -> None:
        """Copies after all batches launched until now."""
        done: Future[float]
        if self._streams is None:
            start_s = time.monotonic()
            self._copy(copy)
            done = Future()
            done.set_result(time.monotonic() - start_s)
        else:
            streams = self._streams[not copy.out]
            after = streams.given_up()
            done = self._threads[not copy.out].submit(self._copy_beside, copy, streams, after)
            done.add_done_callback(lambda _: self._wake())
        self._begun[copy.number] = copy, done

    def ended(self) -> list[Copied]:
        """The copies that ended since the last call. Raises the error of one that failed."""
        ended = [number for number, (_, done) in self._begun.items() if done.done()]
        return [self.finish(number) for number in ended]

    def finish(self, number: int) -> Copied:
        """Waits for the end of this copy. Raises its error."""
        copy, done = self._begun.pop(number)
        return Copied(copy, len(copy.pages) * self._page_bytes, done.result())

    def settle(self, pages: Collection[int]) -> None:
        """Waits for the copies of these device pages, which are about to move."""
        for copy, done in self._begun.values():
            if not done.done() and not set(pages).isdisjoint(copy.pages):
                done.result()

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def _copy(self, copy: PageCopy) -> None:
        device, host = self._ids(copy.pages, self._pages), self._ids(copy.host_pages, self._host)
        if copy.out:
            found = self._pages.index_select(self._dim, device)
            self._host.index_copy_(self._dim, host, found.to(self._host.device))
        else:
            found = self._host.index_select(self._dim, host)
            self._pages.index_copy_(self._dim, device, found.to(self._pages.device))

    @torch.inference_mode()
    def _copy_beside(self, copy: PageCopy, streams: CopyStream, after: Event) -> float:
        """Returns when it is done. Seconds without the wait for `after`, which is on the host: a
        copy queued behind an event could hold up other copies.
        """
        after.synchronize()
        start_s = time.monotonic()
        for page, host_page, count in runs(copy):
            device = self._pages[page : page + count].view(-1)
            host = self._host[host_page : host_page + count].view(-1)
            target, source = (host, device) if copy.out else (device, host)
            arrived = streams.copy(target, source, (), locked=True)
        arrived.synchronize()
        return time.monotonic() - start_s

    def _ids(self, pages: Sequence[int], memory: torch.Tensor) -> torch.Tensor:
        return torch.tensor(pages, device=memory.device)


def runs(copy: PageCopy) -> Iterator[tuple[int, int, int]]:
    """Pages that are neighbours at both ends: (lowest page, lowest host page, count).

    Both ends hand pages out by falling id, so a row's pages often are neighbours.
    """
    pairs = sorted(zip(copy.pages, copy.host_pages, strict=True))
    begin = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i] != (pairs[i - 1][0] + 1, pairs[i - 1][1] + 1):
            yield *pairs[begin], i - begin
            begin = i
