"""`TritonLora` against `reference.lora`, in Triton's interpreter or on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lora_kernels import fused, lora
from lora_kernels.host_reads import fetch_kernel
from lora_kernels.launching import Launcher
from lora_kernels.lora import TritonLora
from lora_kernels.tilings import TILINGS, Choice, Tiling
from tests.kernels.lora_bench import SIZES, placed
from tests.kernels.lora_bench import Bench as AnyBench

RANK_MAX = 48
# The interpreter takes milliseconds a program, so these are few; still there are ranks of several
# blocks, and inputs of several steps and planes.
FEW = Tiling(16, 16, 32, 16, 16, 3, outputs=64, depth=32, programs=1024)
MANY = Tiling(64, 64, 64, 32, 2**31, 1, outputs=64, depth=16, programs=1024)
CUT = replace(MANY, shrink_rows=16, ranks=16)
SMALL = (Choice(24, None, FEW), Choice(None, 8, CUT), Choice(None, None, MANY))


class Bench(AnyBench[TritonLora]):
    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        sizes: Sequence[tuple[int, int]] = SIZES,
        seed: int = 0,
        rows_max: int = 200,
        **options: Any,
    ) -> None:
        super().__init__(
            lambda *where: TritonLora(*where, RANK_MAX, **{"tilings": SMALL, **options}),
            seed,
            dtype,
            device,
            sizes,
            layers=(1,),
        )
        self.lora.reserve(rows_max)


def test_rows_of_many_ranks_in_one_batch(device: torch.device, kernel_dtype: torch.dtype) -> None:
    bench = Bench(device, kernel_dtype)
    placed(bench, [2, 9, 17, 18, RANK_MAX])
    bench.check([3, 0, 1, 2, 2, 5, 0, 4])


def test_gains_beside_adapters_without(device: torch.device, kernel_dtype: torch.dtype) -> None:
    bench = Bench(device, kernel_dtype)
    bench.place(1, 16, 9, gained=True)
    bench.place(2, 16384, 18, targets=(0, 2, 6), gained=True)
    bench.place(3, 32768, 4)
    bench.check([3, 0, 1, 2, 2, 1, 0, 3])
    bench.clear(1)
    bench.place(1, 16, 9)
    bench.check([3, 0, 1, 2])


def test_long_segments_of_many_ranks(device: torch.device, kernel_dtype: torch.dtype) -> None:
    bench = Bench(device, kernel_dtype)
    placed(bench, [8, RANK_MAX, 1])
    bench.check([*[1] * 70, 0, *[2] * 3, *[0] * 5, *[3] * 64, 1])


@pytest.mark.parametrize("rows, rank", [(3, 20), (40, 20), (90, 12)])
def test_the_tilings_that_are_served_with(
    device: torch.device, kernel_dtype: torch.dtype, rows: int, rank: int
) -> None:
    """Inputs of several planes and steps; keys and values a quarter as wide as queries."""
    sizes = ((1088, 512), (1088, 128), (1088, 128), *SIZES[3:])
    # Rows beyond any limit of the table, so that each of the tilings is had with few.
    limits = (3, 20, None, None)
    tilings = [replace(c, rows_max=rows) for c, rows in zip(TILINGS, limits, strict=True)]
    bench = Bench(device, kernel_dtype, sizes, tilings=tilings)
    bench.place(1, 0, rank, targets=(0, 1, 2), scale=0.2)
    bench.check([1] * (rows - 1) + [0])


def test_wide_tiles_are_shrunk_in_pieces_of_their_rows_at_low_ranks(
    device: torch.device, kernel_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(device, kernel_dtype)
    placed(bench, [8, 3, RANK_MAX])
    recorded = record(monkeypatch)
    # 70 rows are a tile of 64 and one of 6, of which the last three quarters are nobody's.
    bench.check([*[1] * 70, *[2] * 17, 0])
    assert recorded[0].grid == (3, 3 * 4)
    del recorded[:]
    bench.check([*[1] * 70, *[3] * 17, 0])
    assert recorded[0].grid == (3, 3 * 1)


@pytest.mark.parametrize("rows", [None, 32])
@pytest.mark.parametrize("counts", [(3, 2, 1, 4), (0, 5, 30, 40)])
def test_gate_and_up_give_the_bits_of_their_deltas_and_then_the_activation(
    device: torch.device, kernel_dtype: torch.dtype, counts: tuple[int, ...], rows: int | None
) -> None:
    """rows: what a captured step of few rows pads them to."""
    sizes = (*SIZES[:4], (24, 56), (24, 56), (56, 24))
    bench = Bench(device, kernel_dtype, sizes)
    bench.place(1, 0, 20)
    bench.place(2, 16384, 8, targets=(5,))
    bench.place(3, 24576, 3, targets=(1, 4, 5), gained=True)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    bench.random.shuffle(slots)
    if rows is not None and len(slots) > rows:
        rows = len(slots)
    bench.lora.begin(slots, rows)
    x, y = bench.operands(rows or len(slots), 2)
    added = y.clone()
    bench.lora.add(x, added, 1, 2)
    for gelu, activation in ((False, fused.silu_mul), (True, fused.gelu_mul)):
        bench.lora.start(x, 1, 2)
        assert torch.equal(bench.lora.add_gated(x, y, 1, 2, gelu), activation(added))


def test_gate_and_up_of_one_adapter_alone_and_of_none(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "ALONE_ROWS", 2)
    bench = Bench(device, sizes=(*SIZES[:4], (24, 56), (24, 56), (56, 24)))
    placed(bench, [8])
    for slots in ([1] * 4, [0] * 4):
        bench.lora.begin(slots)
        x, y = bench.operands(4, 2)
        added = y.clone()
        bench.lora.add(x, added, 1, 2)
        again = y.clone()
        assert torch.equal(bench.lora.add_gated(x, again, 1, 2), fused.silu_mul(added))
        assert torch.equal(bench.lora.add_gated(x, y, 1, 2, True), fused.gelu_mul(added))


def test_a_batch_of_base_rows_alone_is_left_as_it_is(device: torch.device) -> None:
    bench = Bench(device)
    placed(bench, [8])
    bench.check([0] * 5)
    bench.lora.begin([0] * 5, rows=8)
    x, y = bench.operands(8, 0)
    before = y.clone()
    bench.lora.add(x, y, 0, 0)
    assert torch.equal(y, before)


def test_projections_that_an_adapter_leaves_alone(device: torch.device) -> None:
    bench = Bench(device)
    bench.place(1, 0, 8, targets=(0, 2))
    bench.place(2, 8192, 4, targets=(6,))
    bench.place(3, 16384, 20, targets=(1, 3, 4))
    bench.place(4, 24576, 2, targets=())
    bench.check([1, 2, 3, 4, 0, 2, 1])


def test_one_row(device: torch.device) -> None:
    bench = Bench(device)
    placed(bench, [5, 32])
    bench.check([0, 2])
    bench.check([1, 0, 1])


def test_widths_that_memory_is_not_aligned_to(device: torch.device) -> None:
    sizes = ((9, 25), (9, 3), (9, 1), (25, 9), (9, 35), (9, 33), (35, 9))
    bench = Bench(device, torch.float32, sizes)
    placed(bench, [8, 3])
    bench.check([1, 2, 0, 1])


def test_rows_in_another_order_give_the_same_bits(device: torch.device) -> None:
    bench = Bench(device)
    placed(bench, [8, 24])
    slots = [1, 2, 1, 0, 2, 2]
    x, y = bench.operands(6, 2)
    results = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 3, 1]):
        own = y[order].clone()
        bench.lora.begin([slots[row] for row in order])
        bench.lora.add(x[order], own, 1, 2)
        results.append(own[torch.tensor(order).argsort()])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_with_and_without_start(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "HOST_BOUND_ROWS", 0)
    for overlap in (True, False):
        bench = Bench(device, overlap=overlap)
        placed(bench, [8, 3])
        for start in (True, False):
            bench.check([1, 2, 0], start=start)


def test_an_adapter_moved_replaced_and_gone(device: torch.device) -> None:
    bench = Bench(device)
    placed(bench, [8, 8])
    rows = [1, 2, 0, 1]
    bench.check(rows)
    bench.move(2, 20_000)
    bench.check(rows)
    start, _ = bench.spans[1]
    bench.clear(1)
    bench.place(1, start, 3, targets=(0, 4), scale=0.3)
    bench.check(rows)
    bench.clear(2)
    bench.check([1, 0, 1, 0])


def test_small_steps_that_are_not_captured_shrink_in_line(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "HOST_BOUND_ROWS", 4)
    bench = Bench(device)
    placed(bench, [8, 3])
    x, _ = bench.operands(6, 0)
    recorded = record(monkeypatch)
    for rows, padded, launches in ((4, None, 0), (5, None, 1), (4, 4, 1)):
        bench.lora.begin(([1, 2] * rows)[:rows], padded)
        bench.lora.start(x[:rows], 1, 0)
        assert len(recorded) == launches, f"{rows} rows, {padded}"
        recorded.clear()


def test_one_adapter_alone_in_a_large_step_runs_as_plain_matmuls(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "ALONE_ROWS", 2)
    bench = Bench(device)
    placed(bench, [8, 3])
    bench.place(3, 20_000, 4, targets=())
    recorded = record(monkeypatch)
    bench.check([0, 1, 1, 1, 0, 3])
    assert not recorded
    for slots in ([1, 0, 1], [1, 1]):
        bench.check(slots)
        assert recorded, slots
        recorded.clear()


def test_a_launch_once_captured_follows_any_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph keeps of a launch is its grid and its arguments."""
    rows = 20
    bench = Bench(device)
    placed(bench, [4, 40, 9, 1])
    addresses = {tensor.data_ptr() for tensor in buffers(bench.lora)}
    for group in (0, 3):
        x, y = bench.operands(rows, group)
        recorded = record(monkeypatch)
        # As graphs are captured: with nobody's rows.
        bench.lora.begin([0] * rows, rows)
        bench.lora.start(x, 1, group)
        bench.lora.add(x, y, 1, group)
        launches = list(recorded)
        assert len(launches) == 2
        for slots in ([1, 2, 3, 4] * 5, [2], [*[4] * 17, 3, 0, 1], []):
            # Padding rows come last, and are the base model's.
            padded = [*slots, *[0] * (rows - len(slots))]
            before = y.clone()
            bench.lora.begin(slots, rows)
            bench.lora.check()
            for launch in launches:
                launch.run()
            bench.compare(x, before, y, padded, 1, group)
        before = y.clone()
        bench.move(2, 30_000 + group * 4000)
        bench.lora.begin([2, 1], rows)
        for launch in launches:
            launch.run()
        bench.compare(x, before, y, [2, 1, *[0] * (rows - 2)], 1, group)
        monkeypatch.undo()
    assert {tensor.data_ptr() for tensor in buffers(bench.lora)} == addresses


def test_a_padded_batch_is_launched_by_its_padded_rows_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(device)
    placed(bench, [4, 40, 9])
    x, y = bench.operands(20, 0)
    recorded = record(monkeypatch)
    for slots in ([0] * 20, [1], [1, 2, 3] * 6):
        bench.lora.begin(slots, 20)
        bench.lora.add(x, y, 1, 0)
    assert len(recorded) == 6
    assert len({launch.grid for launch in recorded[::2]}) == 1
    assert len({launch.grid for launch in recorded[1::2]}) == 1
    # A program for each tile and block of ranks that 20 rows of 3 adapters could be, and no more.
    tiles, blocks = 11, 2
    assert recorded[0].grid == (3, tiles * blocks) and recorded[1].grid == (3, tiles)


def test_more_programs_of_work_than_programs(device: torch.device) -> None:
    bench = Bench(device, tilings=[Choice(None, None, replace(FEW, programs=8))])
    placed(bench, [40, 8, 4])
    bench.check([1, 2, 3, 0] * 5)


def test_memory_grows_with_the_batches_until_it_is_reserved(device: torch.device) -> None:
    bench = Bench(device)
    bench.lora = TritonLora(bench.directory, bench.arena, bench.groups, RANK_MAX, tilings=SMALL)
    placed(bench, [3, 8])
    bench.check([1, 2])
    bench.check([1, 2, 1])
    bench.lora.reserve(8)
    with pytest.raises(AssertionError, match="reserved"):
        bench.lora.begin([0] * 9)


def test_a_rank_over_the_highest_is_refused(device: torch.device) -> None:
    bench = Bench(device)
    placed(bench, [RANK_MAX + 1])
    with pytest.raises(AssertionError, match="rank 49"):
        bench.lora.begin([1, 0])


@pytest.mark.parametrize("seed", range(4))
def test_random_places_moves_clears_and_batches(device: torch.device, seed: int) -> None:
    """The seed is in the test's name."""
    bench = Bench(device, seed=seed)
    for _ in range(6):
        for _ in range(4):
            bench.turn(12)
        bench.check(bench.rows(40), start=bench.random.random() < 0.5)


@dataclass(frozen=True)
class Launch:
    """One launch, to be repeated as it was."""

    launch: Callable[..., None]
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.launch(*self.args, **self.options)


def record(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """LoRA's launches from now on."""
    launches: list[Launch] = []

    launch = Launcher.__getitem__

    def recording(kernel: Launcher, grid: tuple[int, ...]) -> Callable[..., None]:
        if kernel.kernel is fetch_kernel.kernel:
            return launch(kernel, grid)

        def recorded(*args: Any, **options: Any) -> None:
            launches.append(Launch(launch(kernel, grid), grid, args, options))
            launches[-1].run()

        return recorded

    monkeypatch.setattr(Launcher, "__getitem__", recording)
    return launches


def buffers(operation: TritonLora) -> list[torch.Tensor]:
    followed = operation._followed
    planes = [cuts[0].planes for _, cuts in operation._tiled]
    return [operation._table.values, followed.ranks, *planes]
