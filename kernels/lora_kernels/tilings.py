"""The tile sizes of LoRA launches, by the number of rows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes for batches of some size. All but planes_max are powers of two.

    A shrink program computes `rows` × `ranks` outputs and loops over its plane's inputs in steps
    of `inputs`. Planes split the inputs (split-K): a plane sums `plane_inputs` of them, or more if
    that would take more than `planes_max` planes. An expand program computes `rows` × `outputs`
    and loops over the rank in steps of `depth`.
    """

    rows: int
    ranks: int
    inputs: int
    plane_inputs: int
    planes_max: int
    outputs: int
    depth: int
    warps: int = 4
    stages: int = 3

    def planes(self, inputs: int) -> int:
        return min(self.planes_max, max(1, inputs // self.plane_inputs))

    def plane_step(self, inputs: int) -> int:
        """Inputs a plane, rounded up to a whole number of steps."""
        return -(-inputs // (self.planes(inputs) * self.inputs)) * self.inputs


WIDE_ROWS = 64
"""From this many rows a tile, the shrink result is stored in the arena's dtype (see below)."""

# (most rows of the batch, tiling). With few rows of many adapters, reading A and B dominates: tiles
# are as small as tensor cores allow, and planes add programs. With many rows, x and y dominate.
# There the shrink result is one plane in the arena's dtype, so that expand loads its left operand
# without converting it. Triton issue 9433 gives wrong sums on Hopper when the left operand of a
# pipelined product comes from registers; that instruction needs tiles of at least 64 rows.
TILINGS: tuple[tuple[int | None, Tiling], ...] = (
    (16, Tiling(16, 16, 256, plane_inputs=512, planes_max=8, outputs=128, depth=16)),
    (512, Tiling(16, 16, 256, plane_inputs=1024, planes_max=8, outputs=128, depth=16)),
    (None, Tiling(64, 64, 64, plane_inputs=2**31, planes_max=1, outputs=128, depth=32, warps=8)),
)
