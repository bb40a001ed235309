"""The tile sizes of LoRA launches, by the number of rows and the highest rank."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes for batches of some size. All but planes_max are powers of two.

    A tile of the table has `rows`. A shrink program computes `shrink_rows` × `ranks` outputs, so
    several may share a tile, and loops over its plane's inputs in steps of `inputs`. Planes split
    the inputs (split-K): a plane sums `plane_inputs` of them, or more if that would take more than
    `planes_max` planes. An expand program computes `rows` × `outputs` and loops over the rank in
    steps of `depth`. programs: most programs of a launch, which then loop over the tiles.
    """

    rows: int
    shrink_rows: int
    ranks: int
    inputs: int
    plane_inputs: int
    planes_max: int
    outputs: int
    depth: int
    programs: int
    stages: int = 3
    warps: int = 4

    def planes(self, inputs: int) -> int:
        return min(self.planes_max, max(1, inputs // self.plane_inputs))

    def plane_step(self, inputs: int) -> int:
        """Inputs a plane, rounded up to a whole number of steps."""
        return -(-inputs // (self.planes(inputs) * self.inputs)) * self.inputs


@dataclass(frozen=True, slots=True)
class Choice:
    """A tiling for batches of up to `rows_max` rows and ranks of up to `rank_max`. None: any."""

    rows_max: int | None
    rank_max: int | None
    tiling: Tiling

    def suits(self, rows: int, rank: int) -> bool:
        fits = self.rows_max is None or rows <= self.rows_max
        return fits and (self.rank_max is None or rank <= self.rank_max)


WIDE_ROWS = 64
"""From this many rows a tile, the shrink result is stored in the arena's dtype (see below)."""

# A captured graph's launches are as large as any batch of its size needs, and most programs find
# nothing to do: no more of them than run at once on the largest GPUs, for real ones wait for them.
_CAPTURED = 1024
# Steps that are not captured launch what they need. More programs at once hide that each waits for
# the table, then for the directory, then for A or B.
_EXACT = 1 << 14

# The first that suits. With few rows of many adapters, reading A and B dominates: tiles are as
# small as tensor cores allow, and planes add programs. With many rows, x and y dominate. There the
# shrink result is one plane in the arena's dtype, so that expand loads its left operand without
# converting it. Triton issue 9433 gives wrong sums on Hopper when the left operand of a pipelined
# product comes from registers; that instruction needs tiles of at least 64 rows. At low ranks,
# programs of a few rows of x read it fastest; at high ranks, each would read all of A.
TILINGS: tuple[Choice, ...] = (
    Choice(16, None, Tiling(16, 16, 16, 256, 512, 8, outputs=128, depth=16, programs=_CAPTURED)),
    Choice(512, None, Tiling(16, 16, 16, 256, 1024, 8, outputs=128, depth=16, programs=_CAPTURED)),
    Choice(None, 16, Tiling(64, 16, 16, 256, 2**31, 1, outputs=64, depth=16, programs=_EXACT)),
    Choice(None, None, Tiling(64, 64, 16, 128, 2**31, 1, outputs=64, depth=32, programs=_EXACT)),
)
