"""A LoRA launch's work list: the batch's rows, sorted by adapter and cut into tiles of rows.

    | tiles, blocks, all tiles, 0 | slot, first, end, 0 | … tiles_max of them | row | … rows_max |

A tile is the sorted rows first … end - 1, all of one adapter. `blocks` is the number of rank
blocks that the batch's highest rank takes. The first `tiles` are of rows with an adapter; then come
those of rows without one, as slot 0, up to `all tiles`. The table is int32 and has a fixed size, so
that a captured CUDA graph can read any batch at the same address. Kernels read only tiles in use.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HEADER = 4
TILE_FIELDS = 4


def tiles_max(rows: int, slots: int, tile_rows: int) -> int:
    """The most tiles that `rows` rows can take: with every adapter in the batch, most of them
    with one row, and one tile more of rows without an adapter.
    """
    adapters = min(rows, slots - 1)
    return adapters + (rows - adapters) // tile_rows + 1


def rows_at(tiles: int) -> int:
    """The index of the first sorted row in a table with room for `tiles` tiles."""
    return HEADER + tiles * TILE_FIELDS


def fill(
    table: npt.NDArray[np.int32],
    row_slots: Sequence[int],
    ranks: npt.NDArray[np.int32],
    tiles: int,
    tile_rows: int,
    block_ranks: int,
) -> int:
    """Fills the table and returns how many of its values are in use.

    ranks: [slots], each adapter's highest rank; rows whose rank is 0 count as slot 0. tiles: the
    table's capacity.
    """
    slots = np.array(row_slots, np.int32)
    slots[ranks[slots] == 0] = 0
    # Slot 0 comes last.
    order = np.argsort(np.where(slots > 0, slots, len(ranks)), kind="stable")
    ordered = slots[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
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
    table[0] = np.count_nonzero(view[:, 0])
    table[1] = -(-int(ranks[ordered].max(initial=0)) // block_ranks)
    table[2], table[3] = total, 0
    used = rows_at(tiles) + len(order)
    table[rows_at(tiles) : used] = order
    return used
