"""One step on the device: rows of tokens in, sampled tokens out."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from lora_kernels.ops import Lora
from replica.arena import Arena
from replica.decoder import Batch, Decoder, Span, rotary_tables
from replica.request import Sampling
from replica.sampling import Draw, Sampled, sample
from replica.shape import ModelShape
from replica.weights import load_weights


@dataclass(frozen=True, slots=True)
class Row:
    """One request's share of one step.

    tokens: one to decode, a chunk to prefill. position: of tokens[0]; everything before it lies in
    `pages`, which also have room for `tokens`. slot: 0 is the base model. sampling: None when no
    token is wanted, for the chunk does not end the prompt. generated: tokens generated so far.
    carry: tokens[0] is whatever that row of the previous launch samples, and 0 here.
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    slot: int
    sampling: Sampling | None
    seed: int
    generated: int
    carry: int | None = None


class Ticket:
    """A batch that was launched."""

    def __init__(self, sampled: list[Sampled | None]) -> None:
        self._sampled = sampled

    def results(self) -> list[Sampled | None]:
        """A token where one is wanted, in the order of the rows; waits for them."""
        return self._sampled


class Runner:
    """Weights, KV pages and adapter arena of one device."""

    def __init__(self, config: EngineConfig, shape: ModelShape) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.shape = shape
        self.device = _device(config)
        self.dtype = getattr(torch, shape.dtype if config.dtype == "auto" else config.dtype)
        assert isinstance(self.dtype, torch.dtype)
        self.page_tokens = config.page_tokens
        context = min(shape.context, config.context_tokens_max or shape.context)
        self.page_count = self._pages_that_fit(config, context)
        weights = load_weights(config.model, shape, self.dtype, self.device)
        self._decoder = Decoder(
            shape, weights, rotary_tables(shape, context, self.dtype, self.device)
        )
        # Zeros, for what is masked must be finite. One page more than is given out: padding.
        self._cache = torch.zeros(
            shape.layers,
            2,
            shape.kv_heads,
            self.page_count + 1,
            config.page_tokens,
            shape.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

        self.arena = Arena(
            shape, config.adapter_memory, config.directory_slots, self.dtype, self.device
        )
        self._lora = self.arena.lora()
        self._running = False
        self._ran_s = float("-inf")
        self._previous: list[Sampled | None] = []

    def busy(self) -> bool:
        """Whether batches run, one after the other. Any thread may ask."""
        return self._running or time.monotonic() - self._ran_s < _BETWEEN_BATCHES_S

    @property
    def image_dtype_bytes(self) -> int:
        return int(self.dtype.itemsize)

    def _pages_that_fit(self, config: EngineConfig, context: int) -> int:
        shape = self.shape
        token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * self.image_dtype_bytes
        if config.kv_memory is None:
            sequence_pages = -(-min(2048, context) // config.page_tokens)
            return config.batch_rows_max * sequence_pages
        pages = config.kv_memory // (token_bytes * config.page_tokens)
        if pages == 0:
            raise ConfigError(
                f"kv_memory: {config.kv_memory} bytes hold no page of "
                f"{token_bytes * config.page_tokens}",
                field="kv_memory",
            )
        return pages

    def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """One packed batch, prefill chunks and decodes mixed; a token where one is wanted."""
        return self.launch(rows).results()

    def launch(self, rows: Sequence[Row]) -> Ticket:
        """The same, without waiting for the tokens; batches run in the order of their launches."""
        self._running = True
        try:
            known = [row if row.carry is None else self._carried(row) for row in rows]
            self._previous = self._run(known)
        finally:
            self._ran_s = time.monotonic()
            self._running = False
        return Ticket(self._previous)

    def _carried(self, row: Row) -> Row:
        """A launch has computed when it returns: the tokens of the previous one are known."""
        assert row.carry is not None
        sampled = self._previous[row.carry]
        assert sampled is not None, "the row it carries from sampled nothing"
        return dataclasses.replace(row, tokens=[sampled.token, *row.tokens[1:]])

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        # Single tokens first, neighbours in length: they attend together.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens) > 1, rows[i].position))
        packed = [rows[i] for i in order]
        logits = self._decoder.forward(self._batch(packed), self._cache, self._deltas(packed))
        draws = [
            Draw(row.sampling, row.seed, row.position + len(row.tokens), row.generated)
            for row in packed
            if row.sampling is not None
        ]
        tokens = iter(sample(logits, draws, self.shape.eos_tokens))
        results: list[Sampled | None] = [None] * len(rows)
        for i, row in zip(order, packed, strict=True):
            if row.sampling is not None:
                results[i] = next(tokens)
        return results

    def _deltas(self, rows: Sequence[Row]) -> Lora | None:
        if not any(row.slot for row in rows):
            return None
        self._lora.begin([row.slot for row in rows for _ in row.tokens])
        return self._lora

    def _batch(self, rows: Sequence[Row]) -> Batch:
        counts = np.array([len(row.tokens) for row in rows])
        starts = counts.cumsum() - counts
        first = np.array([row.position for row in rows])
        owners = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(owners)) + (first - starts)[owners]
        used = (first + counts - 1) // self.page_tokens + 1
        pages = self._pages(rows, used)
        mine, offsets = pages[owners, positions // self.page_tokens], positions % self.page_tokens
        tokens = np.fromiter(itertools.chain.from_iterable(r.tokens for r in rows), np.int64)
        ends = [i for i, row in enumerate(rows) if row.sampling is not None]
        return Batch(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            targets=self._tensor(mine * self.page_tokens + offsets),
            fresh=self._tensor(mine[offsets == 0]),
            spans=[
                self._span(int(starts[i]), first[i:j], int(counts[i]), pages[i:j])
                for i, j in _cuts(counts, used)
            ],
            wanted=self._tensor((starts + counts - 1)[ends]),
        )

    def _pages(self, rows: Sequence[Row], used: NDArray[np.int64]) -> NDArray[np.int64]:
        """[rows, pages], padded with the page that stays empty."""
        table = np.full((len(rows), int(used.max())), self.page_count)
        for own, row, count in zip(table, rows, used.tolist(), strict=True):
            own[:count] = row.pages[:count]
        return table

    def _span(
        self, start: int, first: NDArray[np.int64], queries: int, pages: NDArray[np.int64]
    ) -> Span:
        """first: position of each row's first token."""
        windows = set(self.shape.windows)
        reach = max((w for w in windows if w is not None), default=0)
        # Where every layer has a window, what lies before the widest is not even gathered.
        begin = np.zeros_like(first) if None in windows else np.maximum(first - reach + 1, 0)
        begin //= self.page_tokens
        used = int(((first + queries - 1) // self.page_tokens - begin).max()) + 1
        columns = np.minimum(begin[:, None] + np.arange(used), pages.shape[1] - 1)
        held = np.take_along_axis(pages, columns, 1).ravel()
        # For keys and values of each head, that page within the cache of one layer.
        parts = np.arange(2 * self.shape.kv_heads) * (self.page_count + 1)
        seen = begin[:, None] * self.page_tokens + np.arange(used * self.page_tokens)
        distance = (first[:, None] + np.arange(queries))[:, :, None] - seen[:, None]
        masks = {}
        for window in windows:
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            mask = np.where(hidden, np.float32("-inf"), np.float32(0))
            masks[window] = self._tensor(mask).to(self.dtype)
        return Span(
            start, len(first), queries, self._tensor(np.add.outer(parts, held).ravel()), masks
        )

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _cuts(counts: NDArray[np.int64], used: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Spans [begin, end) of rows: a chunk is one alone; single tokens go together as long as
    padding all to the longest's pages costs less than another span would. used: pages a row.
    """
    begin = held = 0
    for row, (count, pages) in enumerate(zip(counts.tolist(), used.tolist(), strict=True)):
        held += pages
        padding = (row + 1 - begin) * pages - held
        if row > begin and (count > 1 or padding > held // 4 + _PADDING_PAGES):
            yield begin, row
            begin, held = row, pages
    yield begin, len(counts)


_BETWEEN_BATCHES_S = 0.02
"""Batches that follow each other within this are one piece of work to whoever works beside them."""

# About the pages whose copying takes as long as the calls of one more span.
_PADDING_PAGES = 64


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch finds no CUDA device here", field="device")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
