"""In which order the programs of a matrix product take its tiles."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, row_tiles, column_tiles, GROUP_M):
    """Return the row and the column of a tile, GROUP_M rows of tiles after one another.

    Programs that run together then share GROUP_M tiles of one factor and few of the other, which
    fit the L2 cache.
    """
    group = tile // (GROUP_M * column_tiles)
    place = tile % (GROUP_M * column_tiles)
    first = group * GROUP_M
    rows = tl.minimum(row_tiles - first, GROUP_M)  # the last group may be thinner
    return first + place % rows, place // rows
