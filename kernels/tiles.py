"""Tiles of a matrix product: in which order programs take them, where they lie, their products."""

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


@triton.jit
def tile_start(base, tile, stride, BLOCK: tl.constexpr):
    """Return where a tile's first row lies, in 64 bits.

    Within a tile 32 bits do, which halves the registers of addresses: rows are less than 2²³
    elements apart, as the host has checked.
    """
    return base + tl.cast(tile, tl.int64) * BLOCK * stride


@triton.jit
def _row_offsets(tile, rows, stride, BLOCK: tl.constexpr):
    """Return where a tile's rows lie; those behind the matrix repeat its last row."""
    return tl.minimum(tl.arange(0, BLOCK), rows - 1 - tile * BLOCK)[:, None] * stride


@triton.jit
def tile_products(
    a,  # [M, K], rows a_stride apart
    b,  # [N, K], rows b_stride apart
    c,  # [N, K], rows c_stride apart, or None
    row_tile,
    column_tile,
    rows,
    columns,
    depth,
    a_stride,
    b_stride,
    c_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
):
    """Return a tile of a·bᵀ and of a·cᵀ, [BLOCK_M, BLOCK_N] in fp32, reading a once.

    The second is zeros where c is None. Rows behind the matrices hold repetitions, not zeros.
    """
    k_offsets = tl.arange(0, BLOCK_K)[None, :]
    a_offsets = _row_offsets(row_tile, rows, a_stride, BLOCK_M) + k_offsets
    b_offsets = _row_offsets(column_tile, columns, b_stride, BLOCK_N) + k_offsets
    a = tile_start(a, row_tile, a_stride, BLOCK_M)
    b = tile_start(b, column_tile, b_stride, BLOCK_N)
    if c is not None:
        c_offsets = _row_offsets(column_tile, columns, c_stride, BLOCK_N) + k_offsets
        c = tile_start(c, column_tile, c_stride, BLOCK_N)

    ab = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ac = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        inside = None if EVEN_K else k_offsets < depth - k
        other = None if EVEN_K else 0.0
        a_block = tl.load(a + k + a_offsets, mask=inside, other=other)
        b_block = tl.load(b + k + b_offsets, mask=inside, other=other)
        ab = tl.dot(a_block, b_block.T, ab, input_precision="ieee")
        if c is not None:
            c_block = tl.load(c + k + c_offsets, mask=inside, other=other)
            ac = tl.dot(a_block, c_block.T, ac, input_precision="ieee")
    return ab, ac


@triton.jit
def described_tile_products(
    a, b, c, row_tile, column_tile, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the same through tensor descriptors, which read zeros behind every edge."""
    ab = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ac = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        a_block = a.load([row_tile * BLOCK_M, k])
        b_block = b.load([column_tile * BLOCK_N, k])
        ab = tl.dot(a_block, b_block.T, ab, input_precision="ieee")
        if c is not None:
            c_block = c.load([column_tile * BLOCK_N, k])
            ac = tl.dot(a_block, c_block.T, ac, input_precision="ieee")
    return ab, ac
