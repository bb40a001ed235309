"""Runs batches with Triton kernels. Decode steps replay graphs; tokens stay on the device."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from lora_kernels import fused
from lora_kernels.lora import TritonLora
from replica.model.graphs import Capture, DecodeGraphs
from replica.model.launch import Row, slots_of
from replica.model.logit_rules import Draw, to_device
from replica.model.native import Model
from replica.model.paged_attention import PagedAttention
from replica.model.paged_batch import BufferLayout, Inputs, PackedRows, PageTable, mixed_inputs
from replica.model.prompt_reader import AskedRow, PromptTensors, read_prompts
from replica.model.sampling import Choice, choose, narrows, prepare, read
from replica.scheduling.request import PromptResult, Sampled, Sampling

_GREEDY = Sampling(temperature=0.0)
_NARROW = Draw(Sampling(temperature=1.0, top_k=2, top_p=0.5, logprobs=1), 0, 0, 0)


class PagedTicket:
    """choice: on the host after `event`. places: the row of each output; None if that row does not
    sample. rows: number of rows in the launch. prompts: on the host after `event`; None if no row
    tells of its prompt.
    """

    def __init__(
        self,
        choice: Choice,
        draws: Sequence[Draw],
        places: Sequence[int | None],
        rows: int,
        prompts: PromptTensors | None,
        event: torch.cuda.Event | None,
    ) -> None:
        self._choice, self._draws, self._places = choice, draws, places
        self._rows, self._prompts, self._event = rows, prompts, event

    def results(self) -> list[Sampled | None]:
        if self._event is not None:
            self._event.synchronize()
        results: list[Sampled | None] = [None] * self._rows
        for place, sampled in zip(self._places, read(self._choice, self._draws), strict=True):
            if place is not None:
                results[place] = sampled
        return results

    def prompts(self) -> dict[int, PromptResult]:
        return {} if self._prompts is None else self._prompts.read()


class PagedExecutor:
    """The executor of a GPU. On CUDA `launch` never waits for the device.

    The graph of a decode step includes greedy sampling and sampling from the whole vocabulary, so
    most batches need one launch. What else a request may ask of sampling is computed after the
    graph, from its logits.
    """

    def __init__(
        self,
        model: Model,
        cache: torch.Tensor,
        lora: TritonLora,
        rows_max: int,
        tokens_max: int,
    ) -> None:
        """rows_max, tokens_max: of a batch."""
        self._shape = shape = model.shape
        self.cache = cache
        self._device = cache.device
        dummy_page, page_tokens = len(cache) - 1, cache.shape[4]
        self._context = model.context
        self._table = PageTable(rows_max, self._context, page_tokens, dummy_page, self._device)
        self._decoder = model.decoder(PagedAttention(cache, shape.heads, rows_max))
        self._ranks = model.ranks
        self._lora = lora
        self._tokens_max = max(tokens_max, rows_max)
        self._lora.reserve(self._tokens_max)
        # The last launch: each output's token and whether its logits are finite, the logits, and
        # the output of each row.
        self._tokens = torch.zeros((rows_max, 2), dtype=torch.int64, device=self._device)
        self._logits = cache.new_empty(rows_max, shape.vocab)
        self._output_of: list[int | None] = []
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture(self, capture: Capture) -> None:
        """Captures decode steps, which are replayed from then on. Call it before any launch."""

        def step(inputs: Inputs, lora: bool) -> None:
            logits, _ = self._step(inputs, lora)
            # One buffer for all buckets: logits in each graph's own memory would add up. The copy
            # takes as long as reading them once.
            self._logits[: len(logits)].copy_(logits)

        graphs = DecodeGraphs(len(self._tokens), self._table)
        graphs.capture(step, lambda rows: self._lora.begin([0] * rows, rows=rows), capture)
        self._graphs = graphs

    def shrink_in_line(self) -> None:
        self._lora.overlap = False

    @torch.inference_mode()
    def warm(self) -> None:
        """Compiles the kernels of batches with chunks and of sampling with top-k and top-p, before
        a request waits for them. It runs the largest step too.

        The number of tokens selects the variant of a kernel. All rows write to the scratch page.
        """
        page_tokens, dummy_page = self._table.page_tokens, self._table.dummy_page
        longest = min(self._tokens_max - 1, self._context)
        for length in sorted({min(4**n // 2, longest) for n in range(1, 12)}):
            pages = [dummy_page] * -(-length // page_tokens)
            rows = [Row([0] * count, 0, pages, 0, _GREEDY, 0, 0) for count in (1, length)]
            packed = PackedRows(rows, [None, None], page_tokens)
            lists = packed.to_device(self._table, BufferLayout(packed.tokens, 2), 2)
            self._lora.begin([0] * packed.tokens, rows=packed.tokens)
            for lora in (True, False):
                logits, _ = self._step(mixed_inputs(packed, lists, self._table), lora)
        self._choice(logits, [_NARROW] * len(logits))
        # A full batch of rows with top-k and top-p needs more memory than any other sampling.
        full = self._logits.new_zeros(self._logits.shape)
        self._choice(full, [_NARROW] * len(full))

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> PagedTicket:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens) > 1)
        ordered = [rows[i] for i in order]
        carries = [None if r.carry is None else self._output_of[r.carry] for r in ordered]
        packed = PackedRows(ordered, carries, self._table.page_tokens)
        previous = self._previous(packed)
        logits, prompts = self._compute(packed)
        if prompts is not None:
            rows_of = [dataclasses.replace(each, row=order[each.row]) for each in prompts.rows]
            prompts = dataclasses.replace(prompts.to_host(), rows=tuple(rows_of))
        places = [order[i] if ordered[i].sampling is not None else None for i in packed.outputs]
        self._output_of = [None] * len(rows)
        for output, place in enumerate(places):
            if place is not None:
                self._output_of[place] = output
        choice = self._choice(logits, packed.draws, previous).to_host()
        if self._ranks is not None and packed.draws:
            # Only rank 0 samples: the others lack the requests' sampling parameters.
            self._ranks.share(self._tokens[: len(packed.draws)])
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return PagedTicket(choice, packed.draws, places, len(rows), prompts, event)

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """[rows that sample, vocab]. rows: without carry, single tokens first."""
        logits, _ = self._compute(PackedRows(rows, [None] * len(rows), self._table.page_tokens))
        return logits

    def _compute(self, packed: PackedRows) -> tuple[torch.Tensor, PromptTensors | None]:
        """Logits [outputs, vocab], and what rows tell of their prompts."""
        slots = slots_of(packed.rows)
        lora = any(slots)
        eager = packed.longest or packed.asked or self._lora.vocabulary.concerns(slots)
        if self._graphs is not None and not eager:
            if lora:
                self._lora.begin(slots, rows=self._graphs.bucket(len(slots)))
            self._graphs.replay(packed, lora)
            return self._logits[: len(slots)], None
        if lora:
            self._lora.begin(slots)
        layout = BufferLayout(packed.tokens, len(packed.rows))
        lists = packed.to_device(self._table, layout, len(packed.rows))
        return self._step(mixed_inputs(packed, lists, self._table), lora, packed.asked)

    def _step(
        self, inputs: Inputs, lora: bool, asked: Sequence[AskedRow] = ()
    ) -> tuple[torch.Tensor, PromptTensors | None]:
        """As `_compute`, and puts the logits' tokens in `_tokens`. Graphs capture it."""
        batch = inputs.batch
        if inputs.carry is not None:
            # An index of -1 reads an arbitrary token, which `where` ignores.
            tokens = torch.where(inputs.carry < 0, batch.tokens, self._tokens[:, 0][inputs.carry])
            batch = dataclasses.replace(batch, tokens=tokens)
        deltas, decoder, prompts = self._lora if lora else None, self._decoder, None
        if asked:
            hidden = decoder.hidden(batch, deltas)
            head = partial(decoder.head, hidden, deltas=deltas)
            prompts = read_prompts(hidden, head, self._shape.vocab, asked)
            logits = head(batch.wanted)
        else:
            logits = decoder.forward(batch, deltas)
        tokens = fused.choose(logits, inputs.temperature, inputs.uniform)
        self._tokens[: len(tokens)].copy_(tokens)
        return logits, prompts

    def _previous(self, packed: PackedRows) -> torch.Tensor | None:
        """The token that each output's row carries, before the launch overwrites it. None if no
        draw needs one.
        """
        if not any(draw.carried and draw.sampling.looks_back for draw in packed.draws):
            return None
        # Rows that carry nothing get an arbitrary token, which nothing reads.
        index = [max(packed.carries[i], 0) for i in packed.outputs]
        return self._tokens[:, 0][to_device(index, np.int64, self._device)]

    def _choice(
        self, logits: torch.Tensor, draws: Sequence[Draw], previous: torch.Tensor | None = None
    ) -> Choice:
        """The tokens that `_step` sampled, or new ones if a row needs more than `_step` does."""
        vocab = self._shape.vocab
        if all(_plain(draw, vocab) for draw in draws):
            tokens = self._tokens[: len(draws)]
            # A clone on a CPU, where `to_host` copies nothing and the next launch overwrites them.
            return Choice(tokens.clone() if tokens.is_cpu else tokens, None)
        metadata = prepare(draws, self._shape.eos_tokens, vocab, self._device, kernel=True)
        choice = choose(logits, metadata, previous)
        self._tokens[: len(draws)].copy_(choice.tokens)
        return choice


def _plain(draw: Draw, vocab: int) -> bool:
    """True if `_step` samples this row completely: by temperature only, without logprobs."""
    sampling = draw.sampling
    if sampling.logprobs is not None or draw.generated < sampling.min_tokens or sampling.adjusts:
        return False
    return sampling.temperature == 0 or not narrows(sampling, vocab)
