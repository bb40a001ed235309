"""Page copies beside batches on CUDA; on a CPU the same with streams that do work at once."""

from collections.abc import Iterator

import pytest
import torch

from replica.adapters.host_pool import locked_pool
from replica.adapters.streams import CopyStream, Event
from replica.engine.page_copier import PageCopier, runs
from replica.scheduling.pages import PageCopy

PAGES, HOST_PAGES, ELEMENTS = 40, 24, 3 * 2**18  # 3 MiB a page in fp32
PIECE_BYTES = 2**18  # several pieces a page


class Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class AtOnce:
    """A `Stream` of a CPU."""

    def wait(self, event: Event) -> None:
        pass

    def record(self) -> Event:
        return Done()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)


def streams(device: torch.device) -> tuple[CopyStream, CopyStream]:
    if device.type == "cuda":
        return CopyStream.on(device, PIECE_BYTES), CopyStream.on(device, PIECE_BYTES)
    staging = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(2)]
    return CopyStream(AtOnce(), AtOnce(), staging), CopyStream(AtOnce(), AtOnce(), staging)


class Copied:
    """A device's pages, the host's, and a copier between them."""

    def __init__(self, device: torch.device) -> None:
        self.pages = torch.randn(PAGES, ELEMENTS, device=device)
        size = HOST_PAGES * ELEMENTS * 4
        self.pool = locked_pool(size, device) if device.type == "cuda" else None
        memory = torch.empty(size, dtype=torch.uint8)
        if self.pool is not None:
            piece = self.pool.take(size)
            assert piece is not None
            memory = piece.memory
        self.host = memory.view(torch.float32).view(HOST_PAGES, ELEMENTS)
        self.woken = 0
        self.copier = PageCopier(self.pages, self.host, 0, self.wake, streams(device))

    def wake(self) -> None:
        self.woken += 1

    def run(self, copy: PageCopy) -> None:
        self.copier.begin(copy)
        assert self.copier.finish(copy.number).bytes == len(copy.pages) * ELEMENTS * 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def copied(request: pytest.FixtureRequest) -> Iterator[Copied]:
    made = Copied(torch.device(request.param))
    yield made
    made.copier.close()


OUT = PageCopy(1, (9, 8, 7, 30, 2), (23, 22, 21, 20, 3), True)


def test_neighbours_at_both_ends_are_copied_together() -> None:
    assert sorted(runs(OUT)) == [(2, 3, 1), (7, 21, 3), (30, 20, 1)]


def test_pages_come_back_whole_to_other_places(copied: Copied) -> None:
    before = copied.pages.clone()
    copied.run(OUT)
    copied.pages[list(OUT.pages)] = -1.0
    back = PageCopy(2, (0, 1, 2, 3, 39), OUT.host_pages, False)
    copied.run(back)
    assert torch.equal(copied.pages[list(back.pages)], before[list(OUT.pages)])
    others = [p for p in range(PAGES) if p not in (*OUT.pages, *back.pages)]
    assert torch.equal(copied.pages[others], before[others])
    assert copied.woken == 2


def test_a_copy_reads_what_batches_wrote_before_and_later_ones_see_what_it_wrote(
    copied: Copied,
) -> None:
    """The device is still busy with work before the copy when the copy is queued."""
    busy = torch.randn(2048, 2048, device=copied.pages.device)
    for number in range(1, 6):
        for _ in range(20 if busy.is_cuda else 1):
            busy = busy @ busy / 50
        copied.pages[5:8] = float(number)
        copied.run(PageCopy(2 * number, (5, 6, 7), (2, 1, 0), True))
        copied.pages[5:8] = 0.0
        copied.run(PageCopy(2 * number + 1, (12, 11, 10), (2, 1, 0), False))
        doubled = copied.pages[10:13] * 2
        assert torch.equal(doubled, torch.full_like(doubled, 2.0 * number))


def test_copies_of_both_directions_end_in_any_order_and_are_told_once(copied: Copied) -> None:
    first = copied.pages[:4].clone()
    copied.run(PageCopy(1, (0, 1, 2, 3), (0, 1, 2, 3), True))
    copied.copier.begin(PageCopy(2, (20, 21, 22, 23), (0, 1, 2, 3), False))
    copied.copier.begin(PageCopy(3, (4, 5), (10, 11), True))
    copied.copier.settle({20, 4})
    ended = {found.copy.number: found for found in copied.copier.ended()}
    assert ended.keys() == {2, 3} and not copied.copier.ended()
    assert all(found.seconds >= 0 for found in ended.values())
    assert torch.equal(copied.pages[20:24], first)


def test_the_error_of_a_copy_is_raised_when_it_is_asked_for(copied: Copied) -> None:
    copied.copier.begin(PageCopy(1, (0, 1), (HOST_PAGES, HOST_PAGES + 1), True))
    with pytest.raises(RuntimeError):
        copied.copier.finish(1)
