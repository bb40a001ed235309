"""One step on the device: rows of tokens in, sampled tokens out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from lora_kernels import ops
from replica.arena import Arena
from replica.decoder import Batch, Decoder, Span, rotary_tables
from replica.request import Sampling
from replica.sampling import Draw, Sampled, sample
from replica.shape import GROUPS, PROJECTIONS, ModelShape
from replica.weights import load_weights


@dataclass(frozen=True, slots=True)
class Row:
    """One request's share of one step.

    tokens: one to decode, a chunk to prefill. position: of tokens[0]; everything before it lies in
    `pages`, which also have room for `tokens`. slot: 0 is the base model. sampling: None when no
    token is wanted, for the chunk does not end the prompt. generated: tokens generated so far.
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    slot: int
    sampling: Sampling | None
    seed: int
    generated: int


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
            self.page_count + 1,
            config.page_tokens,
            2,
            shape.kv_heads,
            shape.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

        self.arena = Arena(
            shape, config.adapter_memory, config.directory_slots, self.dtype, self.device
        )
        groups = [
            [(PROJECTIONS.index(name), *shape.projections[name]) for name in group]
            for group in GROUPS
        ]
        self._lora = ops.Lora(self.arena.directory, self.arena.memory, groups)

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

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """One packed batch, prefill chunks and decodes mixed; a token where one is wanted."""
        # Single tokens first: they attend together.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens) > 1)
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

    def _deltas(self, rows: Sequence[Row]) -> ops.Lora | None:
        if not any(row.slot for row in rows):
            return None
        self._lora.begin([row.slot for row in rows for _ in row.tokens])
        return self._lora

    def _batch(self, rows: Sequence[Row]) -> Batch:
        counts = np.array([len(row.tokens) for row in rows])
        starts = counts.cumsum() - counts
        first = np.array([row.position for row in rows])
        pages, spans = self._pages(rows), []
        owners = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(owners)) - starts[owners] + first[owners]
        offsets = positions % self.page_tokens
        mine = pages[owners, positions // self.page_tokens]
        singles = int((counts == 1).sum())
        if singles:
            spans.append(self._span(rows, 0, singles, starts, first, pages))
        spans += [
            self._span(rows, i, i + 1, starts, first, pages) for i in range(singles, len(rows))
        ]
        ends = [i for i, row in enumerate(rows) if row.sampling is not None]
        return Batch(
            tokens=self._tensor(np.fromiter(_tokens(rows), np.int64, len(owners))),
            positions=self._tensor(positions),
            targets=self._tensor(mine * self.page_tokens + offsets),
            fresh=self._tensor(mine[offsets == 0]),
            spans=spans,
            wanted=self._tensor((starts + counts - 1)[ends]),
        )

    def _pages(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """[rows, pages], padded with the page that stays empty."""
        widest = max(len(row.pages) for row in rows)
        padding = [self.page_count] * widest
        return np.array([[*row.pages, *padding[len(row.pages) :]] for row in rows], dtype=np.int64)

    def _span(
        self,
        rows: Sequence[Row],
        begin: int,
        end: int,
        starts: NDArray[np.int64],
        first: NDArray[np.int64],
        pages: NDArray[np.int64],
    ) -> Span:
        queries = len(rows[begin].tokens)
        seeing = first[begin:end, None] + np.arange(queries)
        used = int(seeing.max()) // self.page_tokens + 1
        seen = np.arange(used * self.page_tokens)
        distance = seeing[:, None, :, None] - seen
        masks = {}
        for window in set(self.shape.windows):
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = np.where(hidden, np.float32("-inf"), np.float32(0))
            masks[window] = self._tensor(mask).to(self.dtype)
        return Span(
            start=int(starts[begin]),
            rows=end - begin,
            queries=queries,
            pages=self._tensor(pages[begin:end, :used]),
            masks=masks,
        )

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _tokens(rows: Sequence[Row]) -> Iterable[int]:
    return (token for row in rows for token in row.tokens)


def _device(config: EngineConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
