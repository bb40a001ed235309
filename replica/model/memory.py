"""Divides a device's memory between KV pages and adapter images, or shares it between them."""

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from replica.model.shape import Shape
from replica.scheduling.assembly import Division

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def divide(config: EngineConfig, shape: Shape, dtype_bytes: int) -> Division:
    """shape: of this rank's part of the model. Raises ConfigError."""
    size = config.page_tokens
    page_bytes = kv_page_bytes(config, shape, dtype_bytes)
    context = _context(config, shape)
    if size > context:
        raise ConfigError(
            f"page_tokens: {size}, but a sequence has at most {context} tokens",
            field="page_tokens",
        )
    context_pages = -(-context // size)
    host_pages = (config.host_kv_memory or 0) // page_bytes if config.page_copies else 0
    if config.device_memory is not None:
        pages = config.device_memory // page_bytes - 1
        if pages <= context_pages:
            raise ConfigError(
                f"device_memory: {config.device_memory} bytes leave nothing for adapters: a "
                f"sequence of {context} tokens takes {context_pages * page_bytes} bytes "
                "(context_tokens_max)",
                field="device_memory",
            )
        arena_bytes = (pages - context_pages) * page_bytes
        return Division(pages, page_bytes, context_pages, arena_bytes, True, host_pages)
    if config.kv_memory is None:
        pages = batch_pages(config, shape)
    else:
        pages = config.kv_memory // page_bytes
    if pages == 0:
        raise ConfigError(
            f"kv_memory: {config.kv_memory} bytes hold no page of {page_bytes}", field="kv_memory"
        )
    assert config.adapter_memory is not None, "the sizes are not chosen yet"
    arena_bytes = config.adapter_memory
    return Division(pages, page_bytes, context_pages, arena_bytes, False, host_pages)


def kv_page_bytes(config: EngineConfig, shape: Shape, dtype_bytes: int) -> int:
    """Bytes of one page: keys and values of all layers."""
    token = 2 * shape.cached_layers * shape.kv_heads * shape.head_dim * dtype_bytes
    return token * config.page_tokens


def batch_pages(config: EngineConfig, shape: Shape) -> int:
    """Pages for a full batch of sequences of 2,048 tokens, or of the model's limit if lower."""
    longest = min(2048, _context(config, shape))
    return config.batch_rows_max * -(-longest // config.page_tokens)


def _context(config: EngineConfig, shape: Shape) -> int:
    return min(shape.context, config.context_tokens_max or shape.context)
