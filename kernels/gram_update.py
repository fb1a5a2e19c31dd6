"""gram += hᵀh on the tiles of the upper triangle, each owned by one program.

No atomics, and each tile walks the tokens in order: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from prunekit_kernels.launch import INTERPRETER, architecture, launch
from prunekit_kernels.tuning import Config, choose

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Worth measuring on a GPU with 16-bit h; all fit the 64 KiB of AMD's local memory. 128 by 128 tiles
# spill with 4 warps on NVIDIA.
CANDIDATES: dict[str, list[Config]] = {
    "gram_update": [
        {"BLOCK_F": 128, "BLOCK_T": 64, "BAND": 12, "num_warps": 8, "num_stages": 2},
        {"BLOCK_F": 128, "BLOCK_T": 32, "BAND": 12, "num_warps": 8, "num_stages": 4},
        {"BLOCK_F": 128, "BLOCK_T": 32, "BAND": 6, "num_warps": 8, "num_stages": 4},
        {"BLOCK_F": 128, "BLOCK_T": 128, "BAND": 12, "num_warps": 8, "num_stages": 2},
        {"BLOCK_F": 64, "BLOCK_T": 64, "BAND": 16, "num_warps": 4, "num_stages": 3},
    ]
}


@triton.jit
def _triangle_column(number):
    """Return the column of the tile with this number, counted column by column: 0, 1 1, 2 2 2."""
    column = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # fp32 may be one off either way from 2^24 / 8 on.
    column = tl.where(column * (column + 1) // 2 > number, column - 1, column)
    return tl.where((column + 1) * (column + 2) // 2 <= number, column + 1, column)


@triton.jit
def _triangle_tile(number, blocks, BAND: tl.constexpr):
    """Return the row and column, row <= column, of a tile, in an order that suits the L2 cache.

    Tiles go in bands of BAND columns, row by row, so that those under way at one time share few
    rows and few columns; counting column by column puts each tile's band where it belongs.
    """
    first = _triangle_column(number) // BAND * BAND
    columns = tl.minimum(BAND, blocks - first)
    number -= first * (first + 1) // 2
    corner = number - first * columns  # the band ends in a triangle of its own
    if corner < 0:
        row = number // columns
        column = first + number % columns
    else:
        column = _triangle_column(corner)
        row = first + corner - column * (column + 1) // 2
        column += first
    return row, column


@triton.jit(do_not_specialize=["tokens"])
def _gram_update_kernel(
    gram,  # [F, F] fp32
    h,  # [T, F], rows h_stride apart
    tokens,
    width,
    h_stride,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BAND: tl.constexpr,
):
    row, column = _triangle_tile(tl.program_id(0), tl.cdiv(width, BLOCK_F), BAND)
    rows = row.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    columns = column.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    token = tl.arange(0, BLOCK_T).to(tl.int64)
    left_places = h + rows[:, None] + token[None, :] * h_stride
    right_places = h + token[:, None] * h_stride + columns[None, :]

    sums = tl.zeros([BLOCK_F, BLOCK_F], tl.float32)
    for low in range(0, tokens, BLOCK_T):
        here = low + token < tokens
        left = tl.load(left_places, mask=(rows < width)[:, None] & here[None, :], other=0.0)
        right = tl.load(right_places, mask=here[:, None] & (columns < width)[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
        left_places += BLOCK_T * tl.cast(h_stride, tl.int64)
        right_places += BLOCK_T * tl.cast(h_stride, tl.int64)

    places = gram + rows[:, None] * width + columns[None, :]
    inside = (rows < width)[:, None] & (columns < width)[None, :]
    tl.store(places, tl.load(places, mask=inside) + sums, mask=inside)


def default_config(arch: str, dtype: torch.dtype, *, aligned: bool) -> Config:
    """Return tiles of 128 by 128 for the tensor cores, where rows can be loaded 16 bytes at a time.

    Smaller ones for fp32, which NVIDIA's tensor cores do not multiply, and for rows that are loaded
    element by element: the large ones spill there.
    A band of 12 makes the 132 tiles of an H100's wave read 11 + 12 blocks of columns of h.
    """
    if arch == INTERPRETER:
        return {"BLOCK_F": 16, "BLOCK_T": 16, "BAND": 3, "num_warps": 4, "num_stages": 1}
    stages = 2 if arch.startswith("gfx") else 3
    if dtype == torch.float32 or not aligned:
        return {"BLOCK_F": 64, "BLOCK_T": 32, "BAND": 16, "num_warps": 4, "num_stages": stages}
    return {"BLOCK_F": 128, "BLOCK_T": 64, "BAND": 12, "num_warps": 8, "num_stages": stages}


def gram_update_triton(gram: torch.Tensor, h: torch.Tensor) -> None:
    """Add hᵀh to gram, in place, in every tile that reaches the diagonal or lies above it.

    What lies strictly below the diagonal is left unspecified.

    Args:
        gram: [F, F], fp32, contiguous; changed in place.
        h: [T, F], bf16/fp16/fp32.

    Raises:
        ValueError: gram is not fp32, or h of none of these dtypes.

    Cost:
        T·F² FLOP, 4·F² bytes of gram, and from the cache T·F²·b / BLOCK_F bytes of h.
    """
    if gram.dtype != torch.float32 or h.dtype not in _DTYPES:
        raise ValueError(
            f"gram_update: the Triton kernel takes gram in float32 and h in bfloat16, float16 or "
            f"float32, got {gram.dtype} and {h.dtype}; convert them, or use "
            "PRUNEKIT_BACKEND=reference"
        )
    tokens, width = h.shape
    if tokens == 0:
        return
    if h.stride(1) != 1:
        h = h.contiguous()
    arch = architecture(h.device)
    aligned = width % 16 == 0 and h.stride(0) % 16 == 0
    default = default_config(arch, h.dtype, aligned=aligned)
    config = choose("gram_update", arch, h.dtype, tokens, width, default=default)
    blocks = triton.cdiv(width, config["BLOCK_F"])
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(h):
        launch(
            _gram_update_kernel,
            (blocks * (blocks + 1) // 2,),
            gram,
            h,
            tokens,
            width,
            h.stride(0),
            enable_fp_fusion=True,
            **config,
        )
