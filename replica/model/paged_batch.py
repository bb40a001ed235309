"""Packs the rows of one step into one host buffer, which reaches the device in one launch."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.host_reads import fetch
from replica.model.launch import Row
from replica.model.logit_rules import Draw, draw_of
from replica.model.paged_attention import PagedBatch
from replica.model.prompt_reader import AskedRow
from replica.model.sampling import uniforms
from replica.scheduling.request import Sampling

Array = TypeVar("Array", NDArray[np.int32], torch.Tensor)

# Triton compiles a separate kernel for pointers and strides that are not multiples of 16.
_ALIGNED = 32
_WIDTH_STEP = 16

_UNREAD = Draw(Sampling(temperature=0.0), seed=0, position=0, generated=0)
"""For a row that has logits but does not sample."""


@dataclass(frozen=True, slots=True)
class Lists(Generic[Array]):
    """Views of an int32 buffer: `ids` to `targets` per token, `lengths` to `uniform` per row, and
    the table.

    carry: the output of the previous launch that replaces this token, or -1.
    wanted, temperature, uniform: one per output. temperature, uniform: float32 bits.
    table: the rest of the buffer, flat.
    """

    ids: Array
    carry: Array
    positions: Array
    targets: Array
    lengths: Array
    starts: Array
    wanted: Array
    temperature: Array
    uniform: Array
    table: Array


_LISTS = tuple(field.name for field in dataclasses.fields(Lists))[:-1]


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """The numbers of tokens and rows that a buffer has space for, on the host and on the device."""

    tokens: int
    rows: int

    def size(self, table: int) -> int:
        """Elements of a buffer. table: elements of its table."""
        return sum(self._sizes()) + table

    def cut(self, buffer: Array) -> Lists[Array]:
        ends: list[int] = list(itertools.accumulate(self._sizes(), initial=0))
        views: list[Array] = [buffer[begin:end] for begin, end in itertools.pairwise(ends)]
        return Lists(**dict(zip(_LISTS, views, strict=True)), table=buffer[ends[-1] :])

    def _sizes(self) -> list[int]:
        return [round_up(self.tokens, _ALIGNED)] * 4 + [round_up(self.rows + 1, _ALIGNED)] * 5


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


class HostBuffers:
    """Two alternating host buffers: one can be filled while the device still reads the other. They
    grow on demand. For a GPU they are page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int32) for _ in range(2)]
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def next(self, length: int) -> torch.Tensor:
        self._turn ^= 1
        read = self._read[self._turn]
        if read is not None:
            read.synchronize()
        if len(self._buffers[self._turn]) < length:
            self._buffers[self._turn] = torch.empty(
                1 << (length - 1).bit_length(), dtype=torch.int32, pin_memory=self._on_gpu
            )
        return self._buffers[self._turn][:length]

    def bring(self, target: torch.Tensor) -> None:
        """Fills `target` from the buffer that `next` gave, on the current stream."""
        fetch(target, self._buffers[self._turn][: len(target)])
        if self._on_gpu:
            read = self._read[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            read.record()


class PageTable:
    """The pages of each row: [rows_max, pages of the longest sequence], on the device.

    Its width is fixed, because kernels are specialized by it. Copies to the device are only as wide
    as the batch needs. host: buffers in which batches are packed.
    """

    def __init__(
        self,
        rows_max: int,
        tokens_max: int,
        page_tokens: int,
        dummy_page: int,
        device: torch.device,
    ) -> None:
        """tokens_max: of the longest sequence. dummy_page: the page that padding rows write to."""
        self.page_tokens, self.dummy_page = page_tokens, dummy_page
        self.host = HostBuffers(device)
        width = round_up(-(-tokens_max // page_tokens), _WIDTH_STEP)
        self.pages = torch.full((rows_max, width), dummy_page, dtype=torch.int32, device=device)

    def write(self, flat: torch.Tensor, rows: int, width: int) -> None:
        self.pages[:rows, :width].copy_(flat[: rows * width].view(rows, width))


class PackedRows:
    """Rows in the order of computation, single tokens first, and what they need.

    carries: per row, the output of the previous launch that is its token, or None; kept as −1.
    outputs: rows whose logits are computed: all rows if all are single tokens, else those that
    sample. draws: one per output. asked: rows that tell of their prompts, by their index here.
    """

    def __init__(
        self, rows: Sequence[Row], carries: Sequence[int | None], page_tokens: int
    ) -> None:
        self.rows = rows
        self.carries = [-1 if carry is None else carry for carry in carries]
        self.carried = max(self.carries) >= 0
        self._page_tokens = page_tokens
        self._counts = np.array([len(row.tokens) for row in rows])
        self._first = np.array([row.position for row in rows])
        self._ends = self._counts.cumsum()
        self._used = -(-(self._first + self._counts) // page_tokens)
        self.width = round_up(int(self._used.max()), _WIDTH_STEP)
        self.tokens = int(self._ends[-1])
        self.decodes = int((self._counts == 1).sum())
        chunks = self._counts[self.decodes :]
        assert (chunks > 1).all(), "single tokens come first"
        self.longest = int(chunks.max(initial=0))
        self.outputs = [i for i, r in enumerate(rows) if r.sampling is not None or not self.longest]
        self.draws = [draw_of(rows[i]) or _UNREAD for i in self.outputs]
        self.asked = [
            AskedRow(i, int(self._ends[i]) - len(row.tokens), int(self._ends[i]), row.asked)
            for i, row in enumerate(rows)
            if row.asked is not None
        ]

    def to_device(
        self, table: PageTable, layout: BufferLayout, rows: int, buffer: torch.Tensor | None = None
    ) -> Lists[torch.Tensor]:
        """rows: including padding rows after the batch's own. buffer: on the device; None makes a
        new one.
        """
        device = table.pages.device
        length = layout.size(rows * self.width)
        lists = layout.cut(table.host.next(length).numpy())
        self._fill(lists, table.dummy_page, rows)
        _pad(lists, len(self.rows), rows, table.dummy_page * self._page_tokens)
        if buffer is None:
            buffer = torch.empty(length, dtype=torch.int32, device=device)
        table.host.bring(buffer[:length])
        on_device = layout.cut(buffer)
        table.write(on_device.table, rows, self.width)
        return on_device

    def _fill(self, lists: Lists[NDArray[np.int32]], dummy_page: int, height: int) -> None:
        count, tokens, outputs = len(self.rows), self.tokens, len(self.outputs)
        table = lists.table[: height * self.width].reshape(height, self.width)
        table.fill(dummy_page)
        held = itertools.chain.from_iterable(
            row.pages[:used] for row, used in zip(self.rows, self._used.tolist(), strict=True)
        )
        table[:count][np.arange(self.width) < self._used[:, None]] = np.fromiter(held, np.int32)

        begins = self._ends - self._counts
        owners = np.repeat(np.arange(count), self._counts)
        positions = np.arange(tokens) + (self._first - begins)[owners]
        pages, offsets = np.divmod(positions, self._page_tokens)
        ids = itertools.chain.from_iterable(row.tokens for row in self.rows)
        lists.ids[:tokens] = np.fromiter(ids, np.int32, tokens)
        lists.carry[:tokens] = -1
        lists.carry[begins] = self.carries
        lists.positions[:tokens] = positions
        lists.targets[:tokens] = table[owners, pages] * self._page_tokens + offsets
        lists.lengths[:count] = self._first + self._counts
        lists.starts[0] = 0
        lists.starts[1 : count - self.decodes + 1] = self._counts[self.decodes :].cumsum()
        lists.wanted[:outputs] = self._ends[self.outputs] - 1
        temperature = lists.temperature.view(np.float32)[:outputs]
        uniform = lists.uniform.view(np.float32)[:outputs]
        temperature[:] = [draw.sampling.temperature for draw in self.draws]
        uniform[:] = uniforms([d.seed for d in self.draws], [d.position for d in self.draws])


def _pad(lists: Lists[NDArray[np.int32]], begin: int, end: int, target: int) -> None:
    """Makes rows [begin, end) padding: they attend to no key and store theirs at `target`."""
    rows = slice(begin, end)
    for ones in (lists.ids, lists.positions, lists.lengths, lists.temperature, lists.uniform):
        ones[rows] = 0
    lists.carry[rows] = -1
    lists.targets[rows] = target


def padding(table: PageTable, layout: BufferLayout) -> torch.Tensor:
    """A device buffer of padding rows only."""
    host = torch.zeros(layout.size(0) + table.pages.numel(), dtype=torch.int32)
    _pad(layout.cut(host.numpy()), 0, layout.rows, table.dummy_page * table.page_tokens)
    return host.to(table.pages.device)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one step reads, on the device. carry: [tokens], or None if no token is carried.

    temperature, uniform: float32 [outputs], as `lora_kernels.fused.choose` takes them.
    """

    batch: PagedBatch
    carry: torch.Tensor | None
    temperature: torch.Tensor
    uniform: torch.Tensor


def mixed_inputs(packed: PackedRows, lists: Lists[torch.Tensor], table: PageTable) -> Inputs:
    """Inputs of any batch, without padding."""
    rows, tokens, outputs = len(packed.rows), packed.tokens, len(packed.outputs)
    return Inputs(
        batch=PagedBatch(
            tokens=lists.ids[:tokens],
            positions=lists.positions[:tokens],
            targets=lists.targets[:tokens],
            table=table.pages[:rows],
            lengths=lists.lengths[:rows],
            decodes=packed.decodes,
            starts=lists.starts[: rows - packed.decodes + 1],
            longest=packed.longest,
            wanted=lists.wanted[:outputs] if packed.longest else None,
        ),
        carry=lists.carry[:tokens] if packed.carried else None,
        temperature=lists.temperature.view(torch.float32)[:outputs],
        uniform=lists.uniform.view(torch.float32)[:outputs],
    )


def decode_inputs(rows: int, lists: Lists[torch.Tensor], table: PageTable) -> Inputs:
    """Inputs of a batch of single tokens, padded to `rows`. All batches have the same views."""
    return Inputs(
        batch=PagedBatch(
            tokens=lists.ids[:rows],
            positions=lists.positions[:rows],
            targets=lists.targets[:rows],
            table=table.pages[:rows],
            lengths=lists.lengths[:rows],
            decodes=rows,
            starts=lists.starts[:1],
            longest=0,
            wanted=None,
        ),
        carry=lists.carry[:rows],
        temperature=lists.temperature.view(torch.float32)[:rows],
        uniform=lists.uniform.view(torch.float32)[:rows],
    )
