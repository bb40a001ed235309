"""Runs batches with torch operations: it gathers pages, and sequences attend in spans."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.ops import Lora
from replica.model.gather_attention import GatherAttention, ModelInputs, Span
from replica.model.launch import Row, slots_of
from replica.model.logit_rules import Draw, draw_of
from replica.model.native import Model
from replica.model.prompt_reader import AskedRow, PromptTensors, read_prompts
from replica.model.sampling import sample
from replica.scheduling.request import PromptResult, Sampled


class Computed:
    """The ticket of a launch that computes before it returns."""

    def __init__(self, sampled: list[Sampled | None], prompts: PromptTensors | None) -> None:
        self._sampled, self._prompts = sampled, prompts

    def results(self) -> list[Sampled | None]:
        return self._sampled

    def prompts(self) -> dict[int, PromptResult]:
        return {} if self._prompts is None else self._prompts.read()


PAGE_DIM = 3  # of the cache


class GatherExecutor:
    """The executor of a CPU. It runs on any device."""

    def __init__(
        self,
        model: Model,
        lora: Lora,
        page_count: int,
        page_tokens: int,
    ) -> None:
        self._shape = shape = model.shape
        self._lora = lora
        self._ranks = model.ranks
        self._device, self._dtype = model.device, model.dtype
        self._page_count, self._page_tokens = page_count, page_tokens
        size = (shape.cached_layers, 2, shape.kv_heads, page_count + 1, page_tokens, shape.head_dim)
        # Zeros, because masked values must be finite. The additional page is for padding.
        self.cache = _zeros(size, self._dtype, self._device)
        self._decoder = model.decoder(GatherAttention(self.cache))
        self._previous: list[Sampled | None] = []

    def launch(self, rows: Sequence[Row]) -> Computed:
        known = [row if row.carry is None else self._carried(row) for row in rows]
        self._previous, prompts = self._run(known)
        return Computed(self._previous, prompts)

    def _carried(self, row: Row) -> Row:
        assert row.carry is not None
        sampled = self._previous[row.carry]
        assert sampled is not None, "the row to carry from did not sample"
        past = row.past and (row.past[0], [*row.past[1], sampled.token])
        tokens = [sampled.token, *row.tokens[1:]]
        return dataclasses.replace(row, tokens=tokens, carry=None, past=past)

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """[rows that sample, vocab]. rows: without carry, single tokens first."""
        return self._decoder.forward(self._batch(rows), self._deltas(rows))

    def _read(
        self, rows: Sequence[Row], order: Sequence[int]
    ) -> tuple[torch.Tensor, PromptTensors]:
        """Logits, and what rows tell of their prompts. order: the rows' indices in the launch."""
        batch, deltas = self._batch(rows), self._deltas(rows)
        hidden = self._decoder.hidden(batch, deltas)
        head = partial(self._decoder.head, hidden, deltas=deltas)
        ends = itertools.accumulate(len(row.tokens) for row in rows)
        asked = [
            AskedRow(i, end - len(row.tokens), end, row.asked)
            for i, row, end in zip(order, rows, ends, strict=True)
            if row.asked is not None
        ]
        prompts = read_prompts(hidden, head, self._shape.vocab, asked)
        return head(batch.wanted), prompts

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> tuple[list[Sampled | None], PromptTensors | None]:
        # Single tokens first, sorted by length, so that neighbours attend in one span.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens) > 1, rows[i].position))
        packed = [rows[i] for i in order]
        prompts = None
        if any(row.asked for row in packed):
            logits, prompts = self._read(packed, order)
        else:
            logits = self.logits(packed)
        draws = [draw for row in packed if (draw := draw_of(row)) is not None]
        tokens = iter(self._sample(logits, draws))
        results: list[Sampled | None] = [None] * len(rows)
        for i, row in zip(order, packed, strict=True):
            if row.sampling is not None:
                results[i] = next(tokens)
        return results, prompts

    def _sample(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        """Rank 0 samples and broadcasts: the next rows of other ranks may carry these tokens."""
        ranks = self._ranks
        if ranks is None or not draws:
            return sample(logits, draws, self._shape.eos_tokens)
        if ranks.shard.rank:
            tokens = torch.empty(len(draws), dtype=torch.int64, device=self._device)
            ranks.share(tokens)
            return [Sampled(token) for token in tokens.tolist()]
        sampled = sample(logits, draws, self._shape.eos_tokens)
        ranks.share(torch.tensor([s.token for s in sampled], device=self._device))
        return sampled

    def _deltas(self, rows: Sequence[Row]) -> Lora | None:
        slots = slots_of(rows)
        if not any(slots):
            return None
        self._lora.begin(slots)
        return self._lora

    def _batch(self, rows: Sequence[Row]) -> ModelInputs:
        counts = np.array([len(row.tokens) for row in rows])
        starts = counts.cumsum() - counts
        first = np.array([row.position for row in rows])
        owners = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(owners)) + (first - starts)[owners]
        used = (first + counts - 1) // self._page_tokens + 1
        pages = self._pages(rows, used)
        own, offsets = pages[owners, positions // self._page_tokens], positions % self._page_tokens
        tokens = np.fromiter(itertools.chain.from_iterable(r.tokens for r in rows), np.int64)
        ends = [i for i, row in enumerate(rows) if row.sampling is not None]
        return ModelInputs(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            targets=self._tensor(own * self._page_tokens + offsets),
            fresh=self._tensor(own[offsets == 0]),
            spans=[
                self._span(int(starts[i]), first[i:j], int(counts[i]), pages[i:j])
                for i, j in _cuts(counts, used)
            ],
            wanted=self._tensor((starts + counts - 1)[ends]),
        )

    def _pages(self, rows: Sequence[Row], used: NDArray[np.int64]) -> NDArray[np.int64]:
        """[rows, pages], padded with the empty page."""
        table = np.full((len(rows), int(used.max())), self._page_count)
        for own, row, count in zip(table, rows, used.tolist(), strict=True):
            own[:count] = row.pages[:count]
        return table

    def _span(
        self, start: int, first: NDArray[np.int64], queries: int, pages: NDArray[np.int64]
    ) -> Span:
        """first: position of each row's first token."""
        windows = set(self._shape.windows)
        reach = max((w for w in windows if w is not None), default=0)
        # If every layer has a window, pages before the widest one are not gathered.
        begin = np.zeros_like(first) if None in windows else np.maximum(first - reach + 1, 0)
        begin //= self._page_tokens
        used = int(((first + queries - 1) // self._page_tokens - begin).max()) + 1
        columns = np.minimum(begin[:, None] + np.arange(used), pages.shape[1] - 1)
        held = np.take_along_axis(pages, columns, 1).ravel()
        # Keys and values of each head have their own range of pages in a layer's cache.
        parts = np.arange(2 * self._shape.kv_heads) * (self._page_count + 1)
        seen = begin[:, None] * self._page_tokens + np.arange(used * self._page_tokens)
        distance = (first[:, None] + np.arange(queries))[:, :, None] - seen[:, None]
        masks = {}
        for window in windows:
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            mask = np.where(hidden, np.float32("-inf"), np.float32(0))
            masks[window] = self._tensor(mask).to(self._dtype)
        return Span(
            start, len(first), queries, self._tensor(np.add.outer(parts, held).ravel()), masks
        )

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU torch would write the zeros and so allocate all memory at once. numpy leaves zeroing
    to the system, which allocates each page on its first write.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    flat = np.zeros(math.prod(size) * dtype.itemsize, np.uint8)
    return torch.from_numpy(flat).view(dtype).view(size)


def _cuts(counts: NDArray[np.int64], used: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Spans [begin, end) of rows. A chunk is a span of its own. Single tokens share a span while
    padding them to the longest row costs less than another span. used: pages per row.
    """
    begin = held = 0
    for row, (count, pages) in enumerate(zip(counts.tolist(), used.tolist(), strict=True)):
        held += pages
        padding = (row + 1 - begin) * pages - held
        if row > begin and (count > 1 or padding > held // 4 + _PADDING_PAGES):
            yield begin, row
            begin, held = row, pages
    yield begin, len(counts)


# Copying about this many pages takes as long as the calls for one more span.
_PADDING_PAGES = 64
