"""An arena that adapters are placed in by hand; a LoRA operation compared with the reference."""

import random
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from lora_kernels import reference
from lora_kernels.reference import Directory

Groups = Sequence[Sequence[tuple[int, int, int]]]

LAYERS = 2
# Narrow, and with a different width in each place so that a mix-up cannot fit.
SIZES = ((24, 40), (24, 16), (24, 8), (40, 24), (24, 56), (24, 48), (56, 24))
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
SLOTS = 12
# More than the largest image takes, in elements.
SHELF = 36_000
EVERYTHING = tuple(range(len(SIZES)))
# Of the largest number. In float32 a product of the shrink is a sum of up to 1,088 products, in any
# order: a few units in the last place of it. The other types round it, the delta and the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Operation(Protocol):
    def begin(self, row_slots: Sequence[int]) -> None: ...
    def start(self, x: torch.Tensor, layer: int, group: int) -> None: ...
    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...
    def check(self) -> None: ...


Lora = TypeVar("Lora", bound=Operation)


class Bench(Generic[Lora]):
    """sizes: inputs and outputs of each projection, as `SIZES`. layers: those that are checked."""

    def __init__(
        self,
        make: Callable[[Directory, torch.Tensor, Groups], Lora],
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        sizes: Sequence[tuple[int, int]] = SIZES,
        layers: Sequence[int] = range(LAYERS),
        elements: int = SLOTS * SHELF,
    ) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        # Whatever is read beside an image shows.
        self.arena = torch.full((elements,), float("nan"), dtype=dtype, device=device)
        self.directory = Directory(SLOTS, LAYERS, len(SIZES))
        self.sizes = sizes
        self.layers = layers
        self.groups = [[(index, *sizes[index]) for index in group] for group in GROUPS]
        self.lora = make(self.directory, self.arena, self.groups)
        self.spans: dict[int, tuple[int, int]] = {}

    def place(
        self,
        slot: int,
        start: int,
        rank: int,
        targets: Sequence[int] = EVERYTHING,
        scale: float = 1.5,
        gained: bool = False,
    ) -> int:
        """Random weights; rank and scale differ by layer and projection where they can. Gives the
        image's end. gained: all but the first target have gains.
        """
        size = (LAYERS, len(self.sizes))
        a, b = np.zeros(size, np.int64), np.zeros(size, np.int64)
        ranks, scales = np.zeros(size, np.int32), np.zeros(size, np.float32)
        gains = np.zeros(size, np.int64) if gained else None
        offset = 0
        for layer in range(LAYERS):
            for projection in targets:
                inputs, outputs = self.sizes[projection]
                own = max(rank - layer - projection % 3, 1)
                a[layer, projection], b[layer, projection] = offset, offset + own * inputs
                ranks[layer, projection] = own
                scales[layer, projection] = scale / (1 + layer + projection)
                offset += own * (inputs + outputs)
                if gains is not None and projection != targets[0]:
                    gains[layer, projection], offset = offset, offset + 2 * outputs
        self.arena[start : start + offset] = self.randn(offset) * 0.3
        self.directory.write(slot, start, a, b, ranks, scales, gains)
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

    def check(self, row_slots: Sequence[int], *, start: bool = True) -> None:
        """One step, every group. start: whether `start` is called before `add`."""
        self.lora.begin(row_slots)
        self.lora.check()
        for layer in self.layers:
            for group in range(len(self.groups)):
                x, y = self.operands(len(row_slots), group)
                before = y.clone()
                if start:
                    self.lora.start(x, layer, group)
                self.lora.add(x, y, layer, group)
                self.compare(x, before, y, row_slots, layer, group)

    def compare(
        self,
        x: torch.Tensor,
        before: torch.Tensor,
        y: torch.Tensor,
        row_slots: Sequence[int],
        layer: int,
        group: int,
    ) -> None:
        """y is what the reference makes of `before`, and rows of the base model are untouched."""
        wanted = before.float()
        outputs = [(projection, width) for projection, _, width in self.groups[group]]
        reference.lora(x, wanted, row_slots, self.directory, self.arena, layer, outputs)
        tolerance = TOLERANCE[self.arena.dtype] * (1 + wanted.abs().max().item())
        error = (y - wanted).abs().max()
        assert error <= tolerance, f"not what the reference gives: {error} over {tolerance}"
        base = [row for row, slot in enumerate(row_slots) if slot == 0]
        assert torch.equal(y[base], before[base]), "a base row was touched"

    def operands(self, rows: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of a launch."""
        inputs = self.groups[group][0][1]
        outputs = sum(width for _, _, width in self.groups[group])
        return self.randn(rows, inputs), self.randn(rows, outputs)

    def randn(self, *size: int) -> torch.Tensor:
        values = torch.randn(*size, generator=self.generator)
        return values.to(self.arena.device, self.arena.dtype)

    def rows(self, count: int) -> list[int]:
        """A batch: single rows of anything, then runs of one slot, as decode and prefill give."""
        slots = [0, *sorted(self.spans)]
        singles = [self.random.choice(slots) for _ in range(self.random.randrange(count))]
        runs: list[int] = []
        for _ in range(self.random.randrange(3)):
            runs += [self.random.choice(slots)] * self.random.randrange(1, count)
        return [*singles, *runs] or [0]

    def turn(self, shelves: int) -> None:
        """Places, clears, moves, or does nothing, at random."""
        free = set(range(shelves)) - {start // SHELF for start, _ in self.spans.values()}
        shelf = self.random.choice(sorted(free)) * SHELF if free else None
        match self.random.randrange(8):
            case 0 | 1 if len(self.spans) < SLOTS - 1 and shelf is not None:
                slot = self.random.choice([s for s in range(1, SLOTS) if s not in self.spans])
                targets = sorted(self.random.sample(EVERYTHING, self.random.randrange(1, 8)))
                rank = self.random.choice([1, 3, 8, 16, 24, 40])
                gained = self.random.random() < 0.3
                self.place(slot, shelf, rank, targets, self.random.random() * 2, gained)
            case 2 if self.spans:
                self.clear(self.random.choice(sorted(self.spans)))
            case 3 if self.spans and shelf is not None:
                self.move(self.random.choice(sorted(self.spans)), shelf)
            case _:
                pass


def placed(bench: Bench[Lora], ranks: Sequence[int]) -> None:
    """Slots from 1 on, one image behind the other, each at a multiple of 16 elements."""
    end = 0
    for slot, rank in enumerate(ranks, start=1):
        end = -(-bench.place(slot, end, rank) // 16) * 16
