"""Measures the GPU memory of the largest step, before KV pages are allocated.

The shape alone cannot tell: kernels, libraries and NCCL allocate memory of unknown size when they
first run.
"""

import gc
from collections.abc import Callable

import torch

from cluster.config import EngineConfig
from replica.adapters.arena import ALIGNMENT_BYTES, Arena
from replica.model.memory import kv_page_bytes
from replica.model.native import Model
from replica.model.page_memory import PageMemory
from replica.scheduling.assembly import Division


def free_beside(device: torch.device, step: Callable[[], None]) -> tuple[int, int]:
    """Runs `step`. Returns the bytes that are free after it, and the most it had reserved. step:
    must keep no reference to a tensor.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device) - before
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0], peak


def run_largest_step(config: EngineConfig, model: Model) -> None:
    """Runs it on an executor with its usual buffers, but with the scratch page only."""
    # These modules import triton.
    from replica.model.paged_attention import paged_cache
    from replica.model.paged_executor import PagedExecutor

    shape, dtype, device = model.shape, model.dtype, model.device
    page_bytes = kv_page_bytes(config, shape, dtype.itemsize)
    pages = PageMemory(Division(0, page_bytes, 0, 0, shared=False), dtype, device)
    arena = Arena(shape, ALIGNMENT_BYTES, config.directory_slots, dtype, device)
    executor = PagedExecutor(
        model,
        paged_cache(pages.flat, shape, config.page_tokens),
        arena.triton_lora(config.rank_max),
        rows_max=config.batch_rows_max,
        tokens_max=config.step_tokens,
    )
    executor.warm()
