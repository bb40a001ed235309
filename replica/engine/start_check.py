"""Compares a model of transformers with its own eager pass, before it serves anything.

Its code was not written for packed rows or our attention. So rows of mixed lengths, with and
without an adapter, are computed in chunks and then token by token, and each alone by the model
itself, on the model's own weights. Windows are narrowed meanwhile, so that short rows exceed them.

In 16 bits rounding makes a right model of one family differ as much as a wrong one of another.
So the limit is relative to the model's own noise: how much its eager pass changes when its
embeddings are disturbed as much as rounding would.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from cluster.config import EngineConfig
from cluster.errors import ModelUnsupported
from lora_kernels.reference import VocabularyDelta, matrices
from lora_kernels.vocabulary import Vocabulary
from replica.adapters.arena import ALIGNMENT_BYTES, Arena
from replica.adapters.image import Layout
from replica.model.gather_executor import GatherExecutor
from replica.model.launch import Row
from replica.model.memory import kv_page_bytes
from replica.model.page_memory import PageMemory
from replica.model.shape import TransformersShape
from replica.model.transformers_model import ATTENTION, TransformersModel, refusing
from replica.scheduling.assembly import Division
from replica.scheduling.request import Sampling

# Each row's slot, and where the chunks of its steps end. Rows without a step are not in the batch.
_ROWS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (5, 6, 7, 8)),
    (0, (13, 23, 24, 25)),
    (1, (30, 40, 41)),
    (0, (3, 33)),
)
_LONGEST = 41
_WINDOW = 16
_RANK, _STRENGTH = 4, 0.1
# The largest mean of Σ p · |Δ log p| over the compared tokens. In fp32 it is about 1e-6.
_LIMIT = 1e-4
# How much embeddings are disturbed, and the largest multiple of the noise that results. Wrong
# models measure 3.5 and more in bf16, 22 and more in fp16; right ones mostly 0.7. A token that
# rounding sends to another expert makes it 1.7 in bf16, and 2.7 in fp16, where those are rarer.
_NOISE = {torch.bfloat16: (2.0**-9, 3.0), torch.float16: (2.0**-12, 10.0)}
_SAMPLING = Sampling(temperature=0.0)


class LogitsExecutor(Protocol):
    def logits(self, rows: Sequence[Row]) -> torch.Tensor: ...


def check(config: EngineConfig, model: TransformersModel, kernels: str) -> None:
    """Raises ModelUnsupported, and sets `model.tells_prompts`. kernels: `triton` or `torch`."""
    with refusing(config.model), _narrowed(model), torch.inference_mode():
        arena, plain = _adapter(model)
        texts = _texts(model.shape.vocab)
        each = -(-_LONGEST // config.page_tokens)
        executor = _executor(config, model, kernels, each * len(_ROWS), arena)
        packed = _packed(executor, texts, each, min(model.context, _LONGEST))
        differences, noises = [], []
        rounding, multiple = _NOISE.get(model.dtype, (0.0, 0.0))
        generator = torch.Generator(model.device).manual_seed(0)
        with _eager(model):
            model.check_head(torch.tensor([texts[0][:_WINDOW]], device=model.device))
            for text, (slot, _), found in zip(texts, _ROWS, packed, strict=True):
                tokens = torch.tensor([text[: max(found, default=1)]], device=model.device)
                deltas = plain if slot else None
                plain.vocabulary.begin([slot] * tokens.numel())
                wanted = model.alone(tokens, deltas).float().log_softmax(-1)
                differences += [_difference(wanted[end - 1], own) for end, own in found.items()]
                if rounding:
                    with _disturbed(model, rounding, generator):
                        again = model.alone(tokens, deltas).float().log_softmax(-1)
                    noises.append(_difference(wanted, again))
        mean = sum(differences) / len(differences)
        limit = multiple * sum(noises) / len(noises) if noises else _LIMIT
        if not mean <= limit:
            raise ModelUnsupported(
                f"architecture {model.shape.architecture!r} computes other probabilities in a "
                f"packed batch than alone: a mean difference of {mean:.2g} in log-probabilities, "
                f"at most {limit:.2g} is tolerated",
                field="model",
            )


def _executor(
    config: EngineConfig, model: TransformersModel, kernels: str, pages: int, arena: Arena
) -> LogitsExecutor:
    if kernels == "torch":
        return GatherExecutor(model, arena.lora(), pages, config.page_tokens)
    # These modules import triton.
    from replica.model.paged_attention import paged_cache
    from replica.model.paged_executor import PagedExecutor

    page_bytes = kv_page_bytes(config, model.shape, model.dtype.itemsize)
    memory = PageMemory(Division(pages, page_bytes, 0, 0, False), model.dtype, model.device)
    return PagedExecutor(
        model,
        paged_cache(memory.flat, model.shape, config.page_tokens),
        arena.triton_lora(config.rank_max),
        rows_max=len(_ROWS),
        tokens_max=len(_ROWS) * _LONGEST,
    )


def _packed(
    executor: LogitsExecutor, texts: Sequence[Sequence[int]], pages: int, context: int
) -> list[dict[int, torch.Tensor]]:
    """For each row, tokens so far → log-probabilities of the next. pages: of each row."""
    ends = [[end for end in own if end <= context] for _, own in _ROWS]
    found: list[dict[int, torch.Tensor]] = [{} for _ in _ROWS]
    for step in range(max(map(len, ends))):
        begun = [i for i, own in enumerate(ends) if step < len(own)]
        rows = {}
        for i in begun:
            start, end = (ends[i][step - 1] if step else 0), ends[i][step]
            own = range(i * pages, (i + 1) * pages)
            rows[i] = Row(texts[i][start:end], start, own, _ROWS[i][0], _SAMPLING, 0, 0)
        order = sorted(begun, key=lambda i: (len(rows[i].tokens) > 1, rows[i].position))
        logits = executor.logits([rows[i] for i in order])
        for i, own_logits in zip(order, logits, strict=True):
            found[i][ends[i][step]] = own_logits.float().log_softmax(-1)
    return found


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Σ p · |Δ log p|, its mean over the tokens. Log-probabilities [..., vocab]."""
    return (wanted.exp() * (wanted - found).abs()).sum(-1).mean().item()


def _texts(vocab: int) -> list[list[int]]:
    """From the middle of the vocabulary: special tokens are at its ends."""
    generator = torch.Generator().manual_seed(0)
    size = (len(_ROWS), _LONGEST)
    texts: list[list[int]] = torch.randint(
        vocab // 4, vocab - vocab // 4, size, generator=generator
    ).tolist()
    return texts


class _PlainDeltas:
    """The deltas of slot 1 for every row."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.vocabulary = Vocabulary(arena.directory, arena.memory)
        self.gained: torch.Tensor | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None:
        sizes = x.shape[1], y.shape[1]
        a, b = matrices(self._arena.directory, self._arena.memory, 1, layer, group, *sizes)
        y += x @ a.T @ b.T


def _adapter(model: TransformersModel) -> tuple[Arena, _PlainDeltas]:
    """An arena with a random adapter of all modules in slot 1, and its deltas in plain torch."""
    shape = model.shape
    size = (shape.layers, len(shape.projections))
    linear = _RANK * sum(sum(shape.projections[name]) for _, name in shape.modules.values())
    vocabulary = _vocabulary(shape, linear)
    a_offset, b_offset = np.zeros(size, np.int64), np.zeros(size, np.int64)
    rank, scale = np.zeros(size, np.int32), np.zeros(size, np.float32)
    layout = Layout(a_offset, b_offset, rank, scale, vocabulary=vocabulary)
    elements = linear + sum(delta.elements for delta in vocabulary)
    capacity = elements * model.dtype.itemsize + ALIGNMENT_BYTES
    arena = Arena(shape, capacity, 2, model.dtype, model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    names, end = list(shape.projections), 0
    for layer, name in shape.modules.values():
        at, (inputs, outputs) = (layer, names.index(name)), shape.projections[name]
        layout.rank[at], layout.scale[at] = _RANK, 1.0
        for offset, width, std in (
            (layout.a_offset, inputs, inputs**-0.5),
            (layout.b_offset, outputs, _STRENGTH),
        ):
            offset[at], end = end, end + _RANK * width
            arena.memory[offset[at] : end].normal_(0.0, std, generator=generator)
    for delta in vocabulary:
        middle, end = delta.b_offset, delta.a_offset + delta.elements
        arena.memory[delta.a_offset : middle].normal_(0.0, _STRENGTH, generator=generator)
        arena.memory[middle:end].normal_(0.0, _STRENGTH, generator=generator)
    arena.place(1, 0, layout)
    return arena, _PlainDeltas(arena)


def _vocabulary(shape: TransformersShape, end: int) -> tuple[VocabularyDelta, ...]:
    """LoRA on embedding and head, from element `end` on."""
    deltas = []
    for each in shape.vocabulary.values():
        b = end + _RANK * each.inputs
        deltas.append(VocabularyDelta(each.head, each.inputs, each.outputs, end, b, _RANK))
        end += deltas[-1].elements
    return tuple(deltas)


@contextlib.contextmanager
def _eager(model: TransformersModel) -> Iterator[None]:
    model.modules.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.modules.set_attn_implementation(ATTENTION)


@contextlib.contextmanager
def _disturbed(
    model: TransformersModel, rounding: float, generator: torch.Generator
) -> Iterator[None]:
    def disturb(_: object, __: object, y: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        return (y.float() * (1 + rounding * noise)).to(y.dtype)

    hook = model.modules.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _narrowed(model: TransformersModel) -> Iterator[None]:
    """Narrows wider windows to `_WINDOW` tokens, in the model's configuration and modules."""
    whole = model.shape
    modules = list(model.modules.modules())
    configs = [module.config for module in modules if hasattr(module, "config")]
    changed = []
    for holder in (*modules, *configs):
        width = getattr(holder, "sliding_window", None)
        if isinstance(width, int) and width > _WINDOW:
            changed.append((holder, width))
            holder.sliding_window = _WINDOW
    windows = tuple(None if w is None else min(w, _WINDOW) for w in whole.windows)
    model.shape = replace(whole, windows=windows)
    try:
        yield
    finally:
        model.shape = whole
        for holder, width in changed:
            holder.sliding_window = width
