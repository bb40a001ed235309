"""A batch's rows sorted by adapter and cut into tiles of rows: what a LoRA launch works through.

    | tiles, blocks, 0, 0 | slot, first, end, 0 | … tiles_max of them | row | … rows_max of them |

A tile is the places first … end - 1 of the sorted rows, all one adapter's. `blocks` is how many
pieces of ranks the highest rank among them takes. Rows of the base model are left out. The table
is int32 and of one size, so that a captured CUDA graph finds any batch where it found the first;
what lies behind `tiles` is never read.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HEADER = 4
TILE_FIELDS = 4


def tiles_max(rows: int, slots: int, tile_rows: int) -> int:
    """The most tiles that so many rows can be: every adapter in the batch, most of them short."""
    adapters = min(rows, slots - 1)
    return adapters + (rows - adapters) // tile_rows


def rows_at(tiles: int) -> int:
    """Where the sorted rows begin in a table with room for so many tiles."""
    return HEADER + tiles * TILE_FIELDS


def fill(
    table: npt.NDArray[np.int32],
    row_slots: Sequence[int],
    ranks: npt.NDArray[np.int32],
    tiles: int,
    tile_rows: int,
    block_ranks: int,
) -> int:
    """Gives how many values of `table` are in use.

    ranks: [slots], the highest of each adapter's; rows of rank 0 are left out. tiles: the room.
    """
    slots = np.array(row_slots, np.int32)
    own = np.flatnonzero(ranks[slots])
    order = own[np.argsort(slots[own], kind="stable")]
    ordered = slots[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=0))
    ends = np.append(begins[1:], len(order))
    counts = -(-(ends - begins) // tile_rows)
    total = int(counts.sum())
    assert total <= tiles
    owners = np.repeat(np.arange(len(begins)), counts)
    nth = np.arange(total) - np.repeat(counts.cumsum() - counts, counts)
    firsts = begins[owners] + nth * tile_rows
    view = table[HEADER : rows_at(total)].reshape(total, TILE_FIELDS)
    view[:, 0] = ordered[firsts]
    view[:, 1] = firsts
    view[:, 2] = np.minimum(firsts + tile_rows, ends[owners])
    view[:, 3] = 0
    table[0] = total
    table[1] = -(-int(ranks[ordered].max(initial=0)) // block_ranks)
    table[2:HEADER] = 0
    used = rows_at(tiles) + len(order)
    table[rows_at(tiles) : used] = order
    return used
