"""One step on the device: rows of tokens in, sampled tokens out."""

import dataclasses
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from cluster.config import EngineConfig
from cluster.errors import ConfigError, ModelUnsupported
from replica.adapters.arena import Arena
from replica.adapters.host_pool import HostPool, locked_pool
from replica.adapters.streams import CopyStream
from replica.engine.node import read_node
from replica.engine.page_copier import Copied, PageCopier
from replica.engine.sizing import on_gpu as sized_on_gpu
from replica.engine.sizing import settled, step_bytes, with_context_that_fits
from replica.engine.tp_messages import Command, CopyPages, FinishPageCopy, MovePages
from replica.model.decoder import rotary_tables
from replica.model.gather_executor import PAGE_DIM, GatherExecutor
from replica.model.launch import Executor, Row, Ticket
from replica.model.memory import batch_pages, divide, kv_page_bytes
from replica.model.native import Model, NativeModel
from replica.model.page_memory import PageMemory
from replica.model.ranks import Ranks
from replica.model.shape import Shape, TransformersShape
from replica.model.weights import load_weights
from replica.scheduling.adapter import PageMove
from replica.scheduling.pages import PageCopy
from replica.scheduling.request import Sampled

log = logging.getLogger(__name__)

_BETWEEN_BATCHES_S = 0.02
"""The runner stays busy for this long after a batch, because the next one usually follows."""

# Pages are copied in pieces of `streams._LOCKED_TIMES` times this size.
_PAGE_PIECE_BYTES = 2**20


class Workers(Protocol):
    """The other ranks of a tensor-parallel engine."""

    def tell(self, command: Command) -> None: ...

    def leading(self, executor: Executor) -> Executor:
        """Wraps rank 0's executor into one that launches on all ranks."""


class Runner:
    """Weights, KV pages and adapter arena of one device.

    whole: shape of the whole model. ranks: the ranks that share it, with tensor parallelism.
    workers: on rank 0, the other ranks, which repeat what this runner does.
    wake: called on any thread when a page copy has ended.
    shape: of this rank's part of the model. tells_prompts: rows can have `asked`.
    """

    def __init__(
        self,
        config: EngineConfig,
        whole: Shape,
        ranks: Ranks | None = None,
        workers: Workers | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.shape = shape = whole.divided(1 if ranks is None else ranks.shard.ranks)
        self.device = _device(config) if ranks is None else ranks.device
        config = settled(config, whole, self.device.type, read_node())
        self.dtype = getattr(torch, config.dtype)
        assert isinstance(self.dtype, torch.dtype)
        self.page_tokens = config.page_tokens
        context = min(shape.context, config.context_tokens_max or shape.context)
        kernels = _kernels(config, self.device)
        if config.device_memory is not None and kernels == "torch":
            raise ConfigError(
                "device_memory: adapters share memory with KV pages only where Triton kernels "
                "read the pages (on a GPU); set adapter_memory and kv_memory",
                field="device_memory",
            )
        if config.sized:
            divide(config, shape, self.image_dtype_bytes)  # raises before the weights are read
        self.model, kernels = self._model(config, whole, context, kernels, ranks)
        model = self.model
        self.tells_prompts = model.tells_prompts
        self._tell: Callable[[Command], None] = lambda command: None
        if workers is not None:
            self._tell = workers.tell
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            config = self._sized(config, model, kernels)
        self.config = config
        self.memory = divide(config, shape, self.image_dtype_bytes)
        assert config.host_memory is not None
        self._pages: PageMemory | None = None
        self.capture_fallback = 0  # a value of `graphs.Captured`
        field = "kv_memory" if config.kv_memory is not None else "batch_rows_max"
        if self.memory.shared:
            field = "device_memory"
        page_bytes = self.memory.pages * self.memory.page_bytes
        if kernels == "triton":
            with _allocating(field, page_bytes):
                self._pages = PageMemory(self.memory, self.dtype, self.device)
        host_pool = locked_pool(config.host_memory, self.device) if on_gpu else None
        with _allocating("adapter_memory", self.memory.arena_bytes):
            self.arena = Arena(
                shape,
                self.memory.arena_bytes,
                config.directory_slots,
                self.dtype,
                self.device,
                self._tell,
                copies=CopyStream.on(self.device) if on_gpu else None,
                host_pool=host_pool,
                memory=self._pages.flat if self._pages is not None and self.memory.shared else None,
            )
        executor: Executor
        if self._pages is None:
            with _allocating(field, page_bytes):
                executor = GatherExecutor(
                    model, self.arena.lora(), self.memory.pages, self.page_tokens
                )
        else:
            executor = self._paged(config, model, self._pages)
        self._executor = executor if workers is None else workers.leading(executor)
        cache = executor.cache if isinstance(executor, GatherExecutor) else None
        self._copier = self._page_copier(cache, ranks, wake)
        self.host_locked_bytes = 0 if host_pool is None else host_pool.size
        self._running = False
        self._ran_s = float("-inf")

    def busy(self) -> bool:
        """True while batches follow each other. Any thread may call it."""
        return self._running or time.monotonic() - self._ran_s < _BETWEEN_BATCHES_S

    @property
    def image_dtype_bytes(self) -> int:
        return int(self.dtype.itemsize)

    def _model(
        self,
        config: EngineConfig,
        whole: Shape,
        context: int,
        kernels: str,
        ranks: Ranks | None,
    ) -> tuple[Model, str]:
        """With the kernels that run it."""
        seed = (config.seed or 0) if config.load_format == "dummy" else None
        if isinstance(whole, TransformersShape):
            # These modules import transformers, which takes seconds.
            from replica.engine.start_check import check
            from replica.model.transformers_model import load_model

            model = load_model(config.model, whole, context, self.dtype, self.device, seed)
            try:
                check(config, model, kernels)
            except ModelUnsupported as error:
                chosen = config.kernels != "auto" or config.device_memory is not None
                if error.field != "kernels" or chosen:
                    raise
                kernels = "torch"
                log.warning("kernels: torch, which is slower: %s", error.message)
                check(config, model, kernels)
            return model, kernels
        weights = load_weights(
            config.model, whole, self.dtype, self.device, dummy_seed=seed, ranks=ranks
        )
        part = whole.divided(1 if ranks is None else ranks.shard.ranks)
        tables = rotary_tables(part, context, self.dtype, self.device)
        windowed = None
        if part.window_rope is not None:
            windowed = rotary_tables(part, context, self.dtype, self.device, part.window_rope)
        return NativeModel(part, weights, tables, windowed), kernels

    def _sized(
        self,
        config: EngineConfig,
        model: Model,
        kernels: str,
    ) -> EngineConfig:
        """Chooses the open sizes on CUDA, the same on every rank."""
        if config.sized:
            return config
        from replica.engine.largest_step import free_beside, run_largest_step

        shape, shared = self.shape, kernels == "triton"

        def step() -> None:
            if shared:
                run_largest_step(config, model)

        free, peak = free_beside(self.device, step)
        if not shared:
            peak = step_bytes(config, shape)
        if model.ranks is not None:
            free, peak = model.ranks.least(free), -model.ranks.least(-peak)
        pages = batch_pages(config, shape) * kv_page_bytes(config, shape, self.image_dtype_bytes)
        sized = sized_on_gpu(config, free, peak, pages, shared=shared)
        return with_context_that_fits(sized, shape)

    def _paged(
        self,
        config: EngineConfig,
        model: Model,
        pages: PageMemory,
    ) -> Executor:
        # These modules import triton.
        from replica.model import graphs
        from replica.model.paged_attention import paged_cache
        from replica.model.paged_executor import PagedExecutor

        executor = PagedExecutor(
            model,
            paged_cache(pages.flat, self.shape, self.page_tokens),
            self.arena.triton_lora(config.rank_max),
            rows_max=config.batch_rows_max,
            tokens_max=config.step_tokens,
        )
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            executor.warm()
        # The modules of transformers may wait for the device, which a graph cannot.
        if config.cuda_graphs and not isinstance(model.shape, TransformersShape):
            self.capture_fallback = graphs.capture_what_can_be(executor, self.device)
        return executor

    def _page_copier(
        self, cache: torch.Tensor | None, ranks: Ranks | None, wake: Callable[[], None]
    ) -> PageCopier | None:
        """Allocates the host's KV pages: as many as the system locks, the same on every rank.

        cache: the pages, if torch gathers them.
        """
        count, page_bytes = self.memory.host_pages, self.memory.page_bytes
        locked: HostPool | None = None
        if self.device.type == "cuda" and cache is None:
            locked = locked_pool(count * page_bytes, self.device)
            count = 0 if locked is None else locked.size // page_bytes
        if ranks is not None:
            count = ranks.least(count)
        self.memory = dataclasses.replace(self.memory, host_pages=count)
        if not count:
            return None
        if cache is not None:
            size = list(cache.shape)
            size[PAGE_DIM] = count
            return PageCopier(cache, torch.empty(size, dtype=cache.dtype), PAGE_DIM, wake)
        assert self._pages is not None
        pages = self._pages.pages
        if locked is None:
            return PageCopier(pages, torch.empty(count, pages.shape[1], dtype=pages.dtype), 0, wake)
        piece = locked.take(count * page_bytes)
        assert piece is not None
        self._host_pages = locked, piece  # the memory stays locked while these live
        host = piece.memory.view(pages.dtype).view(count, -1)
        streams = [CopyStream.on(self.device, _PAGE_PIECE_BYTES) for _ in range(2)]
        return PageCopier(pages, host, 0, wake, (streams[0], streams[1]))

    def copy_pages(self, copy: PageCopy) -> None:
        """Begins to copy pages between device and host, after the batches launched before."""
        assert self._copier is not None
        self._tell(CopyPages(copy))
        self._copier.begin(copy)

    def finish_page_copy(self, number: int) -> None:
        """Waits until this rank has carried out a copy that has ended on rank 0."""
        assert self._copier is not None
        self._copier.finish(number)

    def pages_copied(self) -> list[Copied]:
        """The copies that ended since the last call. Later batches may use their pages."""
        ended = [] if self._copier is None else self._copier.ended()
        for copied in ended:
            self._tell(FinishPageCopy(copied.copy.number))
        return ended

    def close(self) -> None:
        if self._copier is not None:
            self._copier.close()

    def move_pages(self, moves: Sequence[PageMove]) -> None:
        """Moves KV pages in shared memory, between the batches launched before and after."""
        assert self._pages is not None
        self._tell(MovePages(tuple(moves)))
        if self._copier is not None:
            self._copier.settle({move.source for move in moves})
        self.arena.guard(*self._pages.move(moves))

    def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """Runs one batch of prefill chunks and decodes. Gives a token for each row that samples."""
        return self.launch(rows).results()

    def launch(self, rows: Sequence[Row]) -> Ticket:
        """Like `run`, without waiting for the tokens. Batches run in the order of their launch."""
        self._running = True
        try:
            return self._executor.launch(rows)
        finally:
            self._ran_s = time.monotonic()
            self._running = False


@contextmanager
def _allocating(field: str, size: int) -> Iterator[None]:
    """Turns a failed allocation into a ConfigError that names the field."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError
        raise ConfigError(f"{field}: {size} bytes: {error}", field=field) from error


def _kernels(config: EngineConfig, device: torch.device) -> str:
    """Raises ConfigError if the configuration or CUDA needs triton and it cannot run."""
    kernels = config.kernels
    if kernels == "auto":
        kernels = "torch" if device.type == "cpu" else "triton"
    if kernels == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("kernels: triton is not installed (extra `gpu`)", field="kernels")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                "kernels: triton runs on CUDA; on a CPU it needs TRITON_INTERPRET=1",
                field="kernels",
            )
    return kernels


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch finds no CUDA device", field="device")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
