"""LoRA launches against the reference: mixed ranks, base rows, and graphs replayed with others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_kernels import reference
from lora_kernels.lora import TritonLora
from lora_kernels.reference import Directory
from replica.model.decoder import GATE_UP
from replica.model.graphs import CudaCapture, keep
from replica.model.shape import GROUPS, PROJECTIONS, ModelShape
from tests.bench.on_gpu.cases import Case
from tests.bench.on_gpu.inputs import LAYERS, Draw

LAYER = LAYERS - 1


@dataclass(frozen=True, slots=True)
class Adapters:
    """The projections of a model of a few layers, and adapters over them in an arena."""

    directory: Directory
    arena: torch.Tensor
    groups: list[list[tuple[int, int, int]]]

    def operation(self, rows_max: int) -> TritonLora:
        """Of an engine with the default `rank_max`."""
        made = TritonLora(self.directory, self.arena, self.groups, rank_max=256)
        made.reserve(rows_max)
        return made

    def batch(self, draw: Draw, rows: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.groups[group][0][1]
        outputs = sum(out for _, _, out in self.groups[group])
        return draw.normal(rows, inputs), draw.normal(rows, outputs)

    def wanted(
        self, x: torch.Tensor, y: torch.Tensor, slots: Sequence[int], group: int
    ) -> torch.Tensor:
        """In float32."""
        out = y.float()
        outputs = [(index, out) for index, _, out in self.groups[group]]
        reference.lora(x.float(), out, slots, self.directory, self.arena, LAYER, outputs)
        return out


def drawn(
    draw: Draw, shape: ModelShape, ranks: Sequence[int | Sequence[int]], layers: int = LAYERS
) -> Adapters:
    """ranks: of each adapter, one for all of its projections or one for each."""
    sizes = list(shape.projections.values())
    full = [[rank] * len(sizes) if isinstance(rank, int) else rank for rank in ranks]
    order = {name: index for index, name in enumerate(PROJECTIONS)}
    groups = [[(order[n], *shape.projections[n]) for n in group] for group in GROUPS]
    return Adapters(*draw.adapters(sizes, full, layers), groups)


def _groups(tiny: bool) -> Sequence[int]:
    return (0, 3) if tiny else range(len(GROUPS))


def cases(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Case]:
    some = [4, 0, 3, 4, 0, 16, 5]  # not a rank for each projection, and not all even
    ranks = [4, some] if tiny else [8, 16, 64, 256, 16, some, 16, 128]
    adapters = drawn(draw, shape, ranks)
    count = len(ranks) + 1
    batches = {
        "one row": [1],
        "all base": [0] * 5,
        "each row another's": [i % count for i in range(9 if tiny else 64)],
        "one adapter": [2] * (3 if tiny else 33),
    }
    if not tiny:
        rows = [1] * 100 + [0] * 50 + [6] * 129 + [3] * 21 + [4] * 64
        batches |= {
            "segments, shuffled": [rows[i] for i in draw.order(len(rows)).tolist()],
            "a prefill of one": [2] * 600,
            "a prefill of three": [2] * 250 + [7] * 300 + [4] * 150,
            "a prefill of low ranks": [1] * 290 + [0] * 9 + [2] * 270 + [5] * 41,
        }
    operation = adapters.operation(max(map(len, batches.values())))
    for name, slots in batches.items():
        for group in _groups(tiny):
            x, y = adapters.batch(draw, len(slots), group)
            yield _case(name, adapters, operation, slots, group, x, y)
        x, y = adapters.batch(draw, len(slots), GATE_UP)
        yield _gated_case(name, adapters, operation, slots, x, y)


def _gated_case(
    name: str,
    adapters: Adapters,
    operation: TritonLora,
    slots: Sequence[int],
    x: torch.Tensor,
    y: torch.Tensor,
) -> Case:
    def run() -> torch.Tensor:
        operation.begin(slots)
        operation.start(x, LAYER, GATE_UP)
        return operation.add_gated(x, y.clone(), LAYER, GATE_UP)

    return Case(
        f"{name}, gate and up activated",
        run,
        lambda: reference.silu_mul(adapters.wanted(x, y, slots, GATE_UP)),
        False,
    )


def _case(
    name: str,
    adapters: Adapters,
    operation: TritonLora,
    slots: Sequence[int],
    group: int,
    x: torch.Tensor,
    y: torch.Tensor,
    exact: bool = False,
) -> Case:
    def run() -> torch.Tensor:
        own = y.clone()
        operation.begin(slots)
        operation.start(x, LAYER, group)
        operation.add(x, own, LAYER, group)
        return own

    return Case(
        f"{name}, {' '.join(GROUPS[group])}",
        run,
        lambda: adapters.wanted(x, y, slots, group),
        exact,
    )


def replayed(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Case]:
    """Captured with one batch, replayed with others: more segments, higher ranks, all base."""
    adapters = drawn(draw, shape, [2, 4, 3] if tiny else [16, 8, 64, 16, 256, 5])
    rows, count = (4, 4) if tiny else (64, 7)
    batches = {
        "as captured": [1] * rows,
        "each row another's": [i % count for i in range(rows)],
        "all base": [0] * rows,
        "fewer rows": [3] * (rows // 2),
    }
    operation = adapters.operation(rows)
    for group in _groups(tiny):
        x, y = adapters.batch(draw, rows, group)
        own = y.clone()
        operation.begin([1] * rows, rows)
        replay = _captured(operation, x, own, group)
        for name, slots in batches.items():
            yield _replayed_case(name, adapters, operation, slots, group, x, y, own, replay)


def _replayed_case(
    name: str,
    adapters: Adapters,
    operation: TritonLora,
    slots: list[int],
    group: int,
    x: torch.Tensor,
    y: torch.Tensor,
    own: torch.Tensor,
    replay: Callable[[], None],
) -> Case:
    """own: what the captured launches add to."""
    rows = len(y)

    def run() -> torch.Tensor:
        operation.begin(slots, rows)
        own.copy_(y)
        replay()
        return own.clone()

    padded = slots + [0] * (rows - len(slots))
    return Case(
        f"{name}, {' '.join(GROUPS[group])}",
        run,
        lambda: adapters.wanted(x, y, padded, group),
    )


def _captured(
    operation: TritonLora, x: torch.Tensor, y: torch.Tensor, group: int
) -> Callable[[], None]:
    def work() -> None:
        operation.start(x, LAYER, group)
        operation.add(x, y, LAYER, group)

    return CudaCapture(x.device)(work) if x.device.type == "cuda" else keep(work)


def integers(draw: Draw, shape: ModelShape, tiny: bool) -> Iterator[Case]:
    """About six ones a row in x and ±1 in A and B: with rank 256 a delta stays under 256, and every
    sum is exact in each dtype.
    """
    adapters = drawn(draw, shape, [4, 4] if tiny else [16, 64, 256])
    adapters.directory.scale[:] = 1
    adapters.arena.copy_(draw.integers(-1, 1, len(adapters.arena)))
    batches = {
        "decode": [i % (2 if tiny else 4) for i in range(5 if tiny else 64)],
        "prefill": [0, 1, 2] if tiny else [1] * 300 + [2] * 330 + [3] * 12,
    }
    operation = adapters.operation(max(map(len, batches.values())))
    for name, slots in batches.items():
        for group in _groups(tiny):
            x, y = adapters.batch(draw, len(slots), group)
            x = (draw.uniform(*x.shape) < 6 / x.shape[1]).to(x.dtype)
            y = draw.integers(-8, 8, *y.shape)
            yield _case(name, adapters, operation, slots, group, x, y, exact=True)
