"""Device memory as consecutive KV pages. Adapter images may share it."""

from collections.abc import Sequence

import torch

from replica.scheduling.adapter import PageMove
from replica.scheduling.assembly import Division

# Pages per copy, which bounds the buffer. A page of an 8B model is 2 MiB.
_MOVED_AT_ONCE = 32


class PageMemory:
    """flat: the pages, from byte 0. The last one is the scratch page. Not initialized."""

    def __init__(self, division: Division, dtype: torch.dtype, device: torch.device) -> None:
        self._page_bytes = division.page_bytes
        size = division.page_bytes // dtype.itemsize
        # [pages + 1, elements of a page]
        self.pages = torch.empty(division.pages + 1, size, dtype=dtype, device=device)

    @property
    def flat(self) -> torch.Tensor:
        return self.pages.view(-1)

    @torch.inference_mode()
    def move(self, moves: Sequence[PageMove]) -> tuple[int, int]:
        """Copies pages, after batches launched before and before later ones. No page may be both a
        source and a target. Returns offset and size of the bytes that span all sources.
        """
        for start in range(0, len(moves), _MOVED_AT_ONCE):
            some = moves[start : start + _MOVED_AT_ONCE]
            pages = self.pages.index_select(0, self._ids([move.source for move in some]))
            self.pages.index_copy_(0, self._ids([move.target for move in some]), pages)
        first, last = min(m.source for m in moves), max(m.source for m in moves)
        return first * self._page_bytes, (last + 1 - first) * self._page_bytes

    def _ids(self, pages: Sequence[int]) -> torch.Tensor:
        device = self.pages.device
        ids = torch.tensor(pages, pin_memory=device.type == "cuda")
        return ids.to(device, non_blocking=True)
