"""How LoRA launches are cut into programs, by the number of rows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut for batches of some size; all but planes_max are powers of two.

    A program of shrink has `rows` × `ranks` outputs and steps over its plane's inputs by `inputs`;
    a plane sums `plane_inputs` of them, or more where that would be over `planes_max` planes.
    A program of expand has `rows` × `outputs` and steps over the rank by `depth`.
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
        """Inputs a plane, a whole number of steps."""
        return -(-inputs // (self.planes(inputs) * self.inputs)) * self.inputs


WIDE_ROWS = 64
"""From this many rows a tile, the shrink result is kept in the arena's dtype (see below)."""

# (up to that many rows, tiling). Few rows of many adapters: reading A and B is all that counts, so
# tiles are as small as the tensor cores allow and planes make up for the few programs. Many rows:
# x and y count. There the shrink result is one plane in the arena's dtype, for tiles of 64 rows
# must not be converted on the way (Triton issue 9433: wrong sums on Hopper when the left operand
# of a pipelined product comes from registers; fewer than 64 rows do not use that instruction).
TILINGS: tuple[tuple[int | None, Tiling], ...] = (
    (16, Tiling(16, 16, 256, plane_inputs=512, planes_max=8, outputs=128, depth=16)),
    (512, Tiling(16, 16, 256, plane_inputs=1024, planes_max=8, outputs=128, depth=16)),
    (None, Tiling(64, 64, 64, plane_inputs=2**31, planes_max=1, outputs=128, depth=32, warps=8)),
)
