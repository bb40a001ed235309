"""Chooses what the configuration leaves open: the dtype and the memory sizes.

On a CPU:

    rest = replica_memory · memory_utilization − processes − weights − one step − sizes given
    adapters   one of the expected rank for each slot; at most half of the rest, or three quarters
               if 16 such adapters need it
    host tier  an eighth of the rest
    KV pages   a full batch of sequences of 2,048 tokens; at most what is left
    host's KV  as much again; at most an eighth of the rest, and what is left

The system allocates a page of this memory on the first write, but in the end all may be written.

On CUDA adapters and pages share one memory: `memory_utilization` of what is free with the model
loaded and one largest step run. The remainder is for graphs and fragmentation. The host tier and
the host's KV pages are page-locked and therefore allocated at once, which takes 0.5 s a GiB: each
an eighth of the replica's memory, at most 16 GiB.

With tensor parallelism all sizes are per rank.
"""

import dataclasses
from collections.abc import Iterable

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from replica.engine.node import Node
from replica.model.memory import DTYPE_BYTES, batch_pages, divide, kv_page_bytes
from replica.model.shape import ModelShape, Shape, TransformersShape
from replica.scheduling.assembly import Division

_RANK_EXPECTED = 64
# Ray's own processes on a node with replicas: about ten of 100 to 150 MB.
_RAY_BYTES = 10 * 2**27
_ADAPTERS_LEAST = 16
# The server's and the engine's processes: Python, torch and the state of requests.
_PROCESSES_BYTES = 5 * 2**27
_HOST_SHARE = 8
_LOCKED_SHARE = 8
_LOCKED_MAX = 16 * 2**30


def settled(config: EngineConfig, whole: Shape, device: str, node: Node) -> EngineConfig:
    """Chooses what depends on `node` only. On CUDA, `on_gpu` later sizes adapters and pages. Values
    that are set stay, so settling twice changes nothing. whole: shape of the whole model, before
    tensor parallelism. Raises ConfigError.
    """
    dtype = chosen_dtype(config, whole.dtype, device, node.bf16)
    config = dataclasses.replace(config, device=device, dtype=dtype)  # type: ignore[arg-type]
    if device == "cpu":
        return _on_cpu(config, whole, node)
    memory = _replica_memory(config, node) // _LOCKED_SHARE // config.tensor_parallel
    host, kv = config.host_memory, config.host_kv_memory
    return dataclasses.replace(
        config,
        host_memory=min(memory, _LOCKED_MAX) if host is None else host,
        host_kv_memory=min(memory, _LOCKED_MAX) * config.page_copies if kv is None else kv,
    )


def share(memory: int, replicas: int) -> int:
    """replica_memory of each of a fleet's `replicas` on one node."""
    return max((memory - _RAY_BYTES) // replicas, 1)


def chosen_dtype(config: EngineConfig, checkpoint: str, device: str, bf16: bool) -> str:
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu" and not (checkpoint == "bfloat16" and bf16):
        return "float32"
    return checkpoint


def on_gpu(
    config: EngineConfig, free: int, peak: int, page_bytes: int, *, shared: bool
) -> EngineConfig:
    """Sizes adapters and pages on CUDA. Raises ConfigError.

    free: bytes free on the device with only the model loaded. peak: most bytes that one step
    allocates. page_bytes: KV pages of a full batch. shared: the kernels can read adapters and pages
    from one memory.
    """
    if config.sized:
        return config
    memory = int((free - peak) * config.memory_utilization)
    if memory <= 0:
        raise ConfigError(
            f"device_memory: nothing is left for it: with the model loaded {free} bytes are free "
            f"and one step needs {peak}",
            field="device_memory",
        )
    adapters, pages = config.adapter_memory, config.kv_memory
    if adapters is None and pages is None:
        if shared:
            return dataclasses.replace(config, device_memory=memory)
        pages = min(page_bytes, memory // 2)
    if adapters is None:
        assert pages is not None
        adapters = _remainder("adapter_memory", memory, ("kv_memory", pages))
    if pages is None:
        pages = _remainder("kv_memory", memory, ("adapter_memory", adapters))
    return dataclasses.replace(config, adapter_memory=adapters, kv_memory=pages)


def with_context_that_fits(config: EngineConfig, part: Shape) -> EngineConfig:
    """Limits the context, if it is not set, so that one sequence takes at most half of the shared
    memory and adapters keep the rest. On CUDA, after `on_gpu`.
    """
    if config.device_memory is None or config.context_tokens_max is not None:
        return config
    page = kv_page_bytes(config, part, DTYPE_BYTES[config.dtype])
    most = config.device_memory // 2 // page * config.page_tokens
    if most >= part.context:
        return config
    return dataclasses.replace(config, context_tokens_max=max(most, config.page_tokens))


def expected_rank(config: EngineConfig) -> int:
    return min(config.rank_expected or _RANK_EXPECTED, config.rank_max)


def image_bytes(config: EngineConfig, part: Shape, rank: int) -> int:
    """Image of an adapter that targets all projections. part: shape of one rank."""
    width = sum(sum(part.projections[name]) for _, name in part.modules.values())
    return width * rank * DTYPE_BYTES[config.dtype]


def weight_bytes(config: EngineConfig, part: Shape) -> int:
    """Upper bound for one rank. Each rank has all embeddings, and at most the whole head."""
    return part.parameters * DTYPE_BYTES[config.dtype]


def step_bytes(config: EngineConfig, part: Shape) -> int:
    """Rough size of the largest step's intermediates: one layer's activations, logits in fp32."""
    widths = sum(map(sum, part.projections.values()))
    if isinstance(part, ModelShape) and part.mixture is not None:
        widths += part.mixture.active * 3 * (part.hidden + part.intermediate)
    tokens = config.step_tokens
    logits = config.batch_rows_max * part.vocab * 4
    return tokens * widths * DTYPE_BYTES[config.dtype] + 4 * logits


def _on_cpu(config: EngineConfig, whole: Shape, node: Node) -> EngineConfig:
    part = whole.divided(config.tensor_parallel)
    adapters, pages, host = config.adapter_memory, config.kv_memory, config.host_memory
    host_kv = config.host_kv_memory
    if config.device_memory is not None:
        adapters = pages = 0  # Triton's interpreter; only it accepts device_memory on a CPU
    if None not in (adapters, pages, host, host_kv):
        return config
    memory = _replica_memory(config, node) // config.tensor_parallel
    taken = (
        ("the processes", _PROCESSES_BYTES),
        (f"weights in {config.dtype}", weight_bytes(config, part)),
        ("a step", step_bytes(config, part)),
        ("adapter_memory", adapters or 0),
        ("kv_memory", pages or 0),
        ("device_memory", config.device_memory or 0),
        ("host_memory", host or 0),
        ("host_kv_memory", host_kv or 0),
    )
    rest = int(memory * config.memory_utilization) - sum(size for _, size in taken)
    page = kv_page_bytes(config, part, DTYPE_BYTES[config.dtype])
    if rest < 2 * page and None in (adapters, pages):
        field = "adapter_memory" if adapters is None else "kv_memory"
        raise ConfigError(
            f"{field}: nothing is left for it of {memory} bytes · memory_utilization "
            f"{config.memory_utilization}: " + _itemized(taken),
            field=field,
        )
    left = rest
    if adapters is None:
        adapters = min(_adapters_wanted(config, part), _adapters_share(config, part, rest))
        left -= adapters
    if host is None:
        host = max(rest, 0) // _HOST_SHARE
        left -= host
    if pages is None:
        pages = min(batch_pages(config, part) * page, left)
        left -= pages
    if host_kv is None:
        most = min(config.device_memory or pages, rest // _HOST_SHARE, left)
        host_kv = max(most, 0) * config.page_copies
    given = {"host_memory": host, "host_kv_memory": host_kv}
    if config.device_memory is None:
        given |= {"adapter_memory": adapters, "kv_memory": pages}
    return dataclasses.replace(config, **given)  # type: ignore[arg-type]


def _adapters_wanted(config: EngineConfig, part: Shape) -> int:
    """Bytes. Allows for at least one adapter of rank_max, which may come later."""
    slots = config.slots_max or config.directory_slots - 1
    count = max(slots, _ADAPTERS_LEAST)
    return max(
        count * image_bytes(config, part, expected_rank(config)),
        image_bytes(config, part, config.rank_max),
    )


def _adapters_share(config: EngineConfig, part: Shape, rest: int) -> int:
    """Half of the rest, or up to three quarters if `_ADAPTERS_LEAST` adapters need it."""
    fewest = _ADAPTERS_LEAST * image_bytes(config, part, expected_rank(config))
    return max(rest // 2, min(fewest, rest * 3 // 4))


def _replica_memory(config: EngineConfig, node: Node) -> int:
    return node.free if config.replica_memory is None else config.replica_memory


def _remainder(field: str, memory: int, taken: tuple[str, int]) -> int:
    if memory <= taken[1]:
        raise ConfigError(
            f"{field}: nothing is left for it of the {memory} bytes that the device has beside "
            f"the model and one step: {_itemized([taken])}",
            field=field,
        )
    return memory - taken[1]


def _itemized(taken: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {size}" for name, size in taken if size)


def described(asked: EngineConfig, made: EngineConfig, whole: Shape) -> list[str]:
    """The choices of an engine as lines for its log: dtype, dequantized weights, memory, another
    decoder than ours, and a reduced context.
    """
    part = whole.divided(made.tensor_parallel)
    why = ""
    if asked.dtype == "auto" and made.dtype != whole.dtype:
        why = f": the checkpoint is {whole.dtype}, which this processor does not compute natively"
    sizes = f"{made.memory_utilization:g} of what is free on the GPU for adapters and KV pages"
    if made.sized:
        sizes = _sizes(made, divide(made, part, DTYPE_BYTES[made.dtype]), part)
    lines = [
        f"dtype: {made.dtype} on {made.device}{why}",
        *_dequantized(made, whole),
        f"memory: {sizes}, host tier {shown(made.host_memory or 0)}, "
        f"host's KV pages {shown(made.host_kv_memory or 0)}",
    ]
    if isinstance(whole, TransformersShape):
        lines.append("decoder: the modules of transformers, since ours has not all of this model")
    if made.context_tokens_max != asked.context_tokens_max:
        lines.append(
            f"context: {made.context_tokens_max} tokens of the model's {whole.context}: a longer "
            "sequence would take the adapters' memory (context_tokens_max)"
        )
    return lines


def _dequantized(made: EngineConfig, whole: Shape) -> list[str]:
    found = whole.quantization
    if found is None or made.load_format == "dummy":
        return []
    size = shown(weight_bytes(made, whole.divided(made.tensor_parallel)))
    each = " a rank" if made.tensor_parallel > 1 else ""
    return [
        f"weights: dequantized from {found.method} ({found.bits} bits) to {made.dtype}: "
        f"at most {size}{each} ({shown(found.stored_bytes)} on disk)"
    ]


def _sizes(made: EngineConfig, memory: Division, part: Shape) -> str:
    rank = expected_rank(made)
    images = memory.arena_bytes // image_bytes(made, part, rank)
    adapters = f"{min(images, made.slots_max or made.directory_slots - 1)} of rank {rank}"
    size = memory.pages * memory.page_bytes
    pages = f"{memory.pages * made.page_tokens} tokens"
    each = " a rank" if made.tensor_parallel > 1 else ""
    if memory.shared:
        return (
            f"{shown(size)}{each} for KV pages ({pages}) and adapters together (up to {adapters})"
        )
    arena = shown(memory.arena_bytes)
    return f"{arena}{each} for adapters ({adapters}), {shown(size)} for KV pages ({pages})"


def shown(size: int) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
