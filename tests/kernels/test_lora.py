"""Every path of `ops.Lora` against `reference.lora`, and no row ever sees another's weights."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lora_kernels import ops, reference
from lora_kernels.ops import Lora
from lora_kernels.reference import Directory

LAYERS = 2
# Narrow, and with a different width in each place so that a mix-up cannot fit.
SIZES = ((24, 40), (24, 16), (24, 8), (40, 24), (24, 56), (24, 48), (56, 24))
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
SLOTS = 12
# More than the largest image takes, in elements.
SHELF = 36_000
EVERYTHING = tuple(range(len(SIZES)))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Bench:
    """An arena that adapters are placed in by hand, and the operation over it."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype = torch.float32,
        elements: int = SLOTS * SHELF,
        tile_bytes_max: int | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        # Whatever is read beside an image shows.
        self.arena = torch.full((elements,), float("nan"), dtype=dtype)
        self.directory = Directory(SLOTS, LAYERS, len(SIZES))
        groups = [[(index, *SIZES[index]) for index in group] for group in GROUPS]
        self.lora = Lora(self.directory, self.arena, groups, tile_bytes_max)
        self.spans: dict[int, tuple[int, int]] = {}

    def place(
        self,
        slot: int,
        start: int,
        rank: int,
        targets: Sequence[int] = EVERYTHING,
        scale: float = 1.5,
    ) -> int:
        """Random weights; the rank differs by layer where it can. Gives the image's end."""
        size = (LAYERS, len(SIZES))
        a, b = np.zeros(size, np.int64), np.zeros(size, np.int64)
        ranks, scales = np.zeros(size, np.int32), np.zeros(size, np.float32)
        offset = 0
        for layer in range(LAYERS):
            for projection in targets:
                inputs, outputs = SIZES[projection]
                own = max(rank - layer, 1)
                a[layer, projection], b[layer, projection] = offset, offset + own * inputs
                ranks[layer, projection], scales[layer, projection] = own, scale / (1 + layer)
                offset += own * (inputs + outputs)
        values = torch.randn(offset, generator=self.generator) * 0.3
        self.arena[start : start + offset] = values
        self.directory.write(slot, start, a, b, ranks, scales)
        self.spans[slot] = (start, offset)
        return start + offset

    def clear(self, slot: int) -> None:
        start, size = self.spans.pop(slot)
        self.directory.clear(slot)
        self.arena[start : start + size] = float("nan")

    def move(self, slot: int, target: int) -> None:
        start, size = self.spans[slot]
        weights = self.arena[start : start + size].clone()
        self.arena[start : start + size] = float("nan")
        self.arena[target : target + size] = weights
        self.directory.shift(slot, target - start)
        self.spans[slot] = (target, size)

    def check(self, row_slots: Sequence[int]) -> None:
        """One step, every layer and group."""
        self.lora.begin(row_slots)
        self.lora.check()
        for layer in range(LAYERS):
            for number, group in enumerate(GROUPS):
                outputs = [SIZES[index][1] for index in group]
                x = self._randn(len(row_slots), SIZES[group[0]][0])
                y = self._randn(len(row_slots), sum(outputs))
                wanted = y.clone()
                reference.lora(
                    x,
                    wanted,
                    row_slots,
                    self.directory,
                    self.arena,
                    layer,
                    list(zip(group, outputs, strict=True)),
                )
                before = y.clone()
                self.lora.add(x, y, layer, number)
                tolerance = TOLERANCE[self.arena.dtype] * (1 + wanted.float().abs().max().item())
                assert (y - wanted).abs().max() <= tolerance, "not what the reference gives"
                base = [row for row, slot in enumerate(row_slots) if slot == 0]
                assert torch.equal(y[base], before[base]), "a base row was touched"

    def _randn(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(self.arena.dtype)

    def rows(self, count: int) -> list[int]:
        """A batch: single rows of anything, then runs of one slot, as decode and prefill give."""
        slots = [0, *sorted(self.spans)]
        singles = [self.random.choice(slots) for _ in range(self.random.randrange(count))]
        runs: list[int] = []
        for _ in range(self.random.randrange(3)):
            runs += [self.random.choice(slots)] * self.random.randrange(1, count)
        return [*singles, *runs] or [0]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind = request.param
    assert isinstance(kind, torch.dtype)
    return kind


def placed(bench: Bench, ranks: Sequence[int]) -> None:
    end = 0
    for slot, rank in enumerate(ranks, start=1):
        end = bench.place(slot, end, rank)


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
    shelves = [slot * SHELF for slot in range(SLOTS)]
    choice = bench.random
    for _ in range(40):
        taken = {start // SHELF for start, _ in bench.spans.values()}
        free = [shelf for shelf in range(SLOTS) if shelf not in taken]
        match choice.randrange(8):
            case 0 | 1 if len(bench.spans) < SLOTS - 1 and free:
                slot = choice.choice([s for s in range(1, SLOTS) if s not in bench.spans])
                targets = sorted(choice.sample(EVERYTHING, choice.randrange(1, 8)))
                rank = choice.choice([1, 3, 8, 16, 24, 40])
                bench.place(slot, shelves[choice.choice(free)], rank, targets, choice.random() * 2)
            case 2 if bench.spans:
                bench.clear(choice.choice(sorted(bench.spans)))
            case 3 if bench.spans and free:
                bench.move(choice.choice(sorted(bench.spans)), shelves[choice.choice(free)])
            case _:
                rows = bench.rows(12)
                for _ in range(choice.randrange(1, 5)):
                    bench.check(rows)
