"""Every path of `ops.Lora` against `reference.lora`, and no row ever sees another's weights."""

import pytest
import torch

from lora_kernels import ops
from lora_kernels.ops import Lora
from tests.kernels.lora_bench import LAYERS, SIZES, SLOTS, placed
from tests.kernels.lora_bench import Bench as AnyBench


class Bench(AnyBench[Lora]):
    def __init__(
        self, seed: int, dtype: torch.dtype = torch.float32, tile_bytes_max: int | None = None
    ) -> None:
        super().__init__(lambda *where: Lora(*where, tile_bytes_max), seed, dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind = request.param
    assert isinstance(kind, torch.dtype)
    return kind


def test_rows_of_many_ranks_in_one_batch(dtype: torch.dtype) -> None:
    bench = Bench(0, dtype)
    placed(bench, [1, 4, 8, 16, 17, 33, 64])
    for _ in range(6):  # From the second step on they are brought into tiles, some a step.
        bench.check([3, 0, 1, 7, 2, 2, 5, 0, 4, 6])
    assert not bench.lora._segments


def test_a_batch_of_base_rows_alone_is_left_as_it_is(dtype: torch.dtype) -> None:
    bench = Bench(0, dtype)
    placed(bench, [8])
    for _ in range(3):
        bench.check([0] * 5)


def test_projections_that_an_adapter_leaves_alone() -> None:
    bench = Bench(1)
    end = bench.place(1, 0, 8, targets=(0, 2))
    end = bench.place(2, end, 4, targets=(6,))
    end = bench.place(3, end, 20, targets=(1, 3, 4))
    bench.place(4, end, 2)
    for _ in range(4):
        bench.check([1, 2, 3, 4, 0, 2, 1])


def test_gains_beside_adapters_without(dtype: torch.dtype) -> None:
    bench = Bench(1, dtype)
    end = bench.place(1, 0, 8, gained=True)
    end = bench.place(2, end, 4, targets=(0, 2, 6), gained=True)
    bench.place(3, end, 20)
    for _ in range(3):
        bench.check([1, 2, 3, 0, 1, *[2] * 30])
    assert not any(slot in pack._packed for pack in bench.lora._packs for slot in (1, 2))
    bench.clear(1)
    bench.place(1, 0, 8)
    bench.move(2, bench.spans[3][0] + bench.spans[3][1])
    for _ in range(3):
        bench.check([1, 2, 3, 0])


def test_a_prefill_chunk_beside_decoding_rows(dtype: torch.dtype) -> None:
    bench = Bench(2, dtype)
    placed(bench, [8, 16, 4])
    for _ in range(4):
        bench.check([1, 2, 0, 3, 2, *[1] * 40, *[0] * 30, *[3] * 50])
    assert [slot for slot, _ in bench.lora._segments] == [1, 3]


def test_one_adapter_with_most_rows_does_not_slow_the_others_down() -> None:
    bench = Bench(3)
    placed(bench, [16] * 8)
    for _ in range(4):
        bench.check([*[1] * 20, 2, 3, 4, 5, 6, 7, 8])
    assert [slot for slot, _ in bench.lora._segments] == [1]
    assert all(pack._height == 1 for pack in bench.lora._packs)


def test_one_slot_used_again_for_another_adapter(dtype: torch.dtype) -> None:
    bench = Bench(4, dtype)
    placed(bench, [8, 8])
    for _ in range(3):
        bench.check([1, 2, 1])
    start, _ = bench.spans[1]
    bench.clear(1)
    bench.place(1, start, 8)
    for _ in range(3):
        bench.check([1, 2, 1])


def test_an_adapter_that_moved() -> None:
    bench = Bench(5)
    placed(bench, [8, 8])
    for _ in range(3):
        bench.check([1, 2, 1])
    bench.move(2, bench.spans[2][0] + 13)
    for _ in range(3):
        bench.check([1, 2, 1])


def test_what_does_not_fit_the_tiles_runs_without_them() -> None:
    bench = Bench(6, tile_bytes_max=8 * LAYERS * 16 * sum(i + o for i, o in SIZES))
    placed(bench, [16] * 10)
    for _ in range(6):
        bench.check(list(range(11)))
    assert bench.lora._segments
    assert any(pack._count for pack in bench.lora._packs)


def test_a_large_adapter_runs_alone() -> None:
    bench = Bench(9)
    placed(bench, [ops.TILED_RANK_MAX + 8, 8, ops.TILED_RANK_MAX])
    for _ in range(5):
        bench.check([1, 2, 3, 0])
    assert [slot for slot, _ in bench.lora._segments] == [1]


def test_no_room_for_tiles_at_all() -> None:
    bench = Bench(6, tile_bytes_max=0)
    placed(bench, [4, 8])
    for _ in range(3):
        bench.check([1, 2, 0])


def test_an_adapter_gone_from_the_batch_leaves_its_tiles() -> None:
    bench = Bench(7)
    placed(bench, [16] * 8)
    for _ in range(5):
        bench.check(list(range(1, 9)))
    for _ in range(ops.IDLE_STEPS_MAX + 3):
        bench.check([8, 7])
    assert all(pack._count == 2 for pack in bench.lora._packs), "gaps are still computed"


def test_broken_weights_reach_only_their_own_rows() -> None:
    bench = Bench(8)
    placed(bench, [8, 8, 8])
    start, size = bench.spans[2]
    bench.arena[start : start + size] = float("inf")
    y = torch.zeros(4, SIZES[3][1])
    for _ in range(3):
        bench.lora.begin([1, 2, 3, 0])
        y.zero_()
        bench.lora.add(torch.randn(4, SIZES[3][0]), y, 0, 1)
    assert not bench.lora._segments
    assert torch.isfinite(y[[0, 2, 3]]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("seed", range(10))
def test_random_places_moves_clears_and_batches(seed: int) -> None:
    """The seed is in the test's name."""
    bench = Bench(
        seed,
        torch.bfloat16 if seed % 4 == 3 else torch.float32,
        tile_bytes_max=(None, 600_000, 200_000)[seed % 3],
    )
    for _ in range(30):
        bench.turn(SLOTS)
        rows = bench.rows(12)
        for _ in range(bench.random.randrange(1, 4)):
            bench.check(rows)
