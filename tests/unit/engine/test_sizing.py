"""Sizes and dtype that the engine chooses when the configuration leaves them open."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from replica.engine.node import Node
from replica.engine.sizing import (
    described,
    image_bytes,
    on_gpu,
    settled,
    share,
    step_bytes,
    weight_bytes,
    with_context_that_fits,
)
from replica.model.memory import DTYPE_BYTES, batch_pages, divide, kv_page_bytes
from replica.model.quantization import Layout, Quantization
from replica.model.shape import ModelShape, read_shape
from tests.small_files import write_model_config

GIB = 2**30


@pytest.fixture
def small(tmp_path: Path) -> ModelShape:
    """12 layers × 768, as in the benchmarks."""
    read = read_shape(write_model_config(tmp_path / "model"))
    return dataclasses.replace(
        read,
        layers=12,
        hidden=768,
        heads=12,
        kv_heads=4,
        head_dim=64,
        intermediate=2048,
        vocab=8192,
        context=2048,
        dtype="bfloat16",
    )


@pytest.fixture
def large(small: ModelShape) -> ModelShape:
    """Llama-3.1-8B, 8.03 G parameters."""
    return dataclasses.replace(
        small,
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        vocab=128256,
        context=131072,
    )


def made(shape: ModelShape, gib: float, *, bf16: bool = False, **settings: Any) -> EngineConfig:
    """Settled on a CPU with `gib` GiB free."""
    node = Node(int(gib * GIB), int(gib * GIB), bf16)
    return settled(EngineConfig("m", **settings), shape, "cpu", node)


def sizes(config: EngineConfig) -> tuple[int, int, int]:
    adapters, pages, host = config.adapter_memory, config.kv_memory, config.host_memory
    assert adapters is not None and pages is not None and host is not None
    return adapters, pages, host


@pytest.mark.parametrize(
    ("device", "checkpoint", "bf16", "dtype"),
    [
        ("cpu", "bfloat16", True, "bfloat16"),
        ("cpu", "bfloat16", False, "float32"),
        ("cpu", "float16", True, "float32"),
        ("cpu", "float32", True, "float32"),
        ("cuda", "bfloat16", False, "bfloat16"),
        ("cuda", "float16", False, "float16"),
    ],
)
def test_auto_is_what_the_device_computes_natively(
    small: ModelShape, device: str, checkpoint: str, bf16: bool, dtype: str
) -> None:
    shape = dataclasses.replace(small, dtype=checkpoint)
    node = Node(8 * GIB, 8 * GIB, bf16)
    assert settled(EngineConfig("m"), shape, device, node).dtype == dtype
    asked = EngineConfig("m", dtype="bfloat16")
    assert settled(asked, shape, device, node).dtype == "bfloat16"


def test_it_says_that_the_checkpoints_dtype_is_not_computed(small: ModelShape) -> None:
    asked = EngineConfig("m")
    dtype, memory = described(asked, made(small, 8), small)
    assert dtype == (
        "dtype: float32 on cpu: the checkpoint is bfloat16, which this processor does not compute "
        "natively"
    )
    assert memory.startswith("memory: 3.1 GiB for adapters (80 of rank 64), 2.3 GiB for KV pages (")
    assert described(asked, made(small, 8, bf16=True), small)[0] == "dtype: bfloat16 on cpu"


@pytest.mark.parametrize("gib", [1.5, 2, 4, 16, 256])
@pytest.mark.parametrize("bf16", [True, False])
def test_all_that_may_be_touched_fits_the_limit(small: ModelShape, gib: float, bf16: bool) -> None:
    config = made(small, gib, bf16=bf16)
    taken = sum(sizes(config)) + weight_bytes(config, small) + step_bytes(config, small)
    assert taken < 0.9 * gib * GIB - 2**29
    assert divide(config, small, DTYPE_BYTES[config.dtype]).pages > 0


def test_weights_and_images_are_of_the_engines_dtype_not_the_checkpoints(
    large: ModelShape,
) -> None:
    half, full = made(large, 128, bf16=True), made(large, 128)
    assert weight_bytes(half, large) == pytest.approx(16.06e9, rel=0.001)
    assert weight_bytes(full, large) == 2 * weight_bytes(half, large)
    assert image_bytes(half, large, 16) == pytest.approx(84e6, rel=0.01)
    assert image_bytes(full, large, 16) == 2 * image_bytes(half, large, 16)
    with pytest.raises(ConfigError, match="weights in float32 32"):
        made(large, 34)
    assert made(large, 34, bf16=True).adapter_memory


@pytest.mark.parametrize("rank", [8, 64])
def test_there_is_room_for_16_of_the_largest_rank(small: ModelShape, rank: int) -> None:
    config = made(small, 2.5, rank_expected=rank)
    assert sizes(config)[0] >= 16 * image_bytes(config, small, rank)


def test_16_may_take_more_than_half_and_no_more_than_three_quarters(small: ModelShape) -> None:
    half = sizes(made(small, 4, rank_expected=64))
    most = sizes(made(small, 4, rank_expected=256))
    assert most[0] == pytest.approx(1.5 * half[0], rel=0.01)
    assert sum(most) <= sum(half) * 1.01


def test_where_there_is_plenty_no_more_is_taken_than_can_be_used(small: ModelShape) -> None:
    config = made(small, 512, rank_expected=8, rank_max=16)
    adapters, pages, _ = sizes(config)
    assert adapters == 255 * image_bytes(config, small, 8)
    assert pages == batch_pages(config, small) * kv_page_bytes(config, small, 4)
    few = made(small, 512, rank_expected=8, slots_max=2, rank_max=256)
    assert sizes(few)[0] == image_bytes(few, small, 256), "any that is accepted can be added"


def test_no_rank_that_is_refused_is_expected(small: ModelShape) -> None:
    config = made(small, 512, rank_max=16)
    assert sizes(config)[0] == 255 * image_bytes(config, small, 16)


def test_sizes_that_are_given_win_and_count(small: ModelShape) -> None:
    free = sizes(made(small, 4))
    config = made(small, 4, kv_memory=GIB)
    adapters, pages, host = sizes(config)
    assert pages == GIB and adapters < free[0] and host < free[2]
    assert sizes(made(small, 4, adapter_memory=7))[0] == 7
    assert sizes(made(small, 4, host_memory=0))[2] == 0
    given = {"adapter_memory": 2**50, "kv_memory": 2**50, "host_memory": 2**50}
    assert sizes(made(small, 4, **given)) == (2**50,) * 3
    del given["host_memory"]
    assert sizes(made(small, 4, **given)) == (2**50, 2**50, 0), "the host tier can be done without"


def test_the_hosts_kv_pages_take_what_the_devices_leave(small: ModelShape) -> None:
    def host_kv(gib: float, **settings: Any) -> tuple[int, EngineConfig]:
        config = made(small, gib, **settings)
        assert config.host_kv_memory is not None
        return config.host_kv_memory, config

    size, config = host_kv(64)
    assert size == config.kv_memory, "as much again"
    size, config = host_kv(2)
    assert config.kv_memory is not None and 0 <= size < config.kv_memory
    assert host_kv(64, host_kv_memory=7)[0] == 7
    assert host_kv(64, page_copies=False)[0] == 0
    free = sizes(made(small, 4))
    assert sizes(made(small, 4, host_kv_memory=GIB))[0] < free[0], "what is given counts"


@pytest.mark.parametrize(
    ("given", "field"), [("kv_memory", "adapter_memory"), ("adapter_memory", "kv_memory")]
)
def test_what_is_left_nothing_is_named_with_the_numbers(
    small: ModelShape, given: str, field: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: .* of {4 * GIB} .*{given} {2**40}") as caught:
        made(small, 4, **{given: 2**40})
    assert caught.value.field == field


def test_a_replica_takes_of_its_share_whatever_is_free(small: ModelShape) -> None:
    assert sizes(made(small, 512, replica_memory=4 * GIB)) == sizes(made(small, 4))
    assert sizes(made(small, 4, memory_utilization=0.5)) < sizes(made(small, 4))
    assert 3 * share(16 * GIB, 3) < 16 * GIB - GIB, "Ray has its own processes"


def test_ranks_share_what_a_replica_has(small: ModelShape) -> None:
    one, two = made(small, 4), made(small, 8, tensor_parallel=2)
    part = small.divided(2)
    assert sizes(two)[0] > sizes(one)[0] * 0.95, "each has half the weights"
    taken = sum(sizes(two)) + weight_bytes(two, part) + step_bytes(two, part)
    assert 2 * taken < 0.9 * 8 * GIB - GIB


def test_to_settle_again_changes_nothing(small: ModelShape) -> None:
    config = made(small, 4)
    assert settled(config, small, "cpu", Node(8 * GIB, 8 * GIB, True)) == config


def test_on_a_gpu_the_host_tier_is_a_bounded_share_of_the_node(large: ModelShape) -> None:
    def host(**settings: Any) -> tuple[int | None, int | None]:
        asked = EngineConfig("m", **settings)
        config = settled(asked, large, "cuda", Node(64 * GIB, 64 * GIB, False))
        return config.host_memory, config.host_kv_memory

    assert host() == (8 * GIB, 8 * GIB)
    assert host(tensor_parallel=2) == (4 * GIB, 4 * GIB)
    assert host(replica_memory=8 * GIB) == (GIB, GIB)
    assert host(replica_memory=999 * GIB) == (16 * GIB, 16 * GIB)
    assert host(host_memory=0) == (0, 8 * GIB)
    assert host(host_kv_memory=0) == (8 * GIB, 0)
    assert host(page_copies=False) == (8 * GIB, 0)


def gpu(free: int, peak: int, *, shared: bool = True, **settings: Any) -> EngineConfig:
    return on_gpu(EngineConfig("m", **settings), free, peak, 300, shared=shared)


def test_on_a_gpu_one_memory_is_a_share_of_what_model_and_step_leave() -> None:
    config = gpu(1100, 100)
    assert (config.device_memory, config.adapter_memory, config.kv_memory) == (900, None, None)
    assert gpu(1100, 100, memory_utilization=0.5).device_memory == 500


def test_on_a_gpu_sizes_that_are_given_win() -> None:
    assert gpu(1100, 100, device_memory=5000).device_memory == 5000
    config = gpu(1100, 100, adapter_memory=200)
    assert (config.device_memory, config.adapter_memory, config.kv_memory) == (None, 200, 700)
    config = gpu(1100, 100, kv_memory=200)
    assert (config.device_memory, config.adapter_memory, config.kv_memory) == (None, 700, 200)


def test_kernels_that_read_two_memories_get_two() -> None:
    config = gpu(1100, 100, shared=False)
    assert (config.device_memory, config.adapter_memory, config.kv_memory) == (None, 600, 300)
    config = gpu(500, 100, shared=False)
    assert (config.adapter_memory, config.kv_memory) == (180, 180)


def test_a_gpu_that_is_full_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"^device_memory: .* 100 bytes are free .* needs 100$"):
        gpu(100, 100)
    with pytest.raises(ConfigError, match=r"^kv_memory: .* 900 bytes .* adapter_memory 1000$"):
        gpu(1100, 100, adapter_memory=1000)


def test_what_was_chosen_is_told(small: ModelShape) -> None:
    asked = EngineConfig("m", slots_max=20, host_memory=0)
    config = settled(asked, small, "cuda", Node(GIB, GIB, False))
    assert "0.9 of what is free on the GPU" in described(asked, config, small)[1]
    both = on_gpu(config, 4 * GIB, GIB, 0, shared=True)
    _, memory = described(asked, both, small)
    assert memory.startswith("memory: 2.7 GiB for KV pages (")
    assert "tokens) and adapters together (up to 20 of rank 64), host tier 0 bytes" in memory


def test_dequantized_weights_are_told_with_their_size(large: ModelShape) -> None:
    gptq = Quantization("gptq", Layout.GPTQ, 4, (1, 128), stored_bytes=5 * GIB)
    asked = EngineConfig("m", device="cuda", dtype="bfloat16", tensor_parallel=2)
    made = on_gpu(asked, 40 * GIB, GIB, 0, shared=True)
    made = dataclasses.replace(made, host_memory=0)
    shape = dataclasses.replace(large, quantization=gptq)
    assert described(asked, made, shape)[1] == (
        "weights: dequantized from gptq (4 bits) to bfloat16: at most 8.5 GiB a rank "
        "(5.0 GiB on disk)"
    )
    dummy = dataclasses.replace(made, load_format="dummy")
    assert described(asked, dummy, shape) == described(asked, dummy, large)


def test_a_context_that_a_small_card_cannot_hold_is_cut_and_said(large: ModelShape) -> None:
    """A 24 GB card has 6 GB free beside an 8B model. The model's whole context takes 17 GB."""
    asked = EngineConfig("m", device="cuda", dtype="bfloat16")
    open_ = dataclasses.replace(asked, host_memory=0)
    sized = on_gpu(open_, 7 * 10**9, 0, 10**12, shared=True)
    made = with_context_that_fits(sized, large)
    page = kv_page_bytes(made, large, 2)
    assert made.context_tokens_max == sized.device_memory // 2 // page * 16  # type: ignore[operator]
    division = divide(made, large, 2)
    assert division.arena_bytes >= 0.49 * 6.3 * 10**9
    assert "context: 24032 tokens of the model's 131072" in described(asked, made, large)[-1]


def test_a_context_that_fits_or_was_asked_for_stays(large: ModelShape) -> None:
    sized = EngineConfig("m", device="cuda", dtype="bfloat16", device_memory=40 * 10**9)
    assert with_context_that_fits(sized, large) is sized
    short = dataclasses.replace(sized, device_memory=6 * 10**9, context_tokens_max=4096)
    assert with_context_that_fits(short, large) is short
