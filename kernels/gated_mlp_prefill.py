"""The gated MLP for many tokens: h = act(x·gateᵀ)·(x·upᵀ) in one kernel, then h·downᵀ in another.

The first kernel keeps a tile's gate and up products in two accumulators and activates them before
anything is written, so that of width F only h goes to memory and back; on the way it can leave the
statistics that pruning needs.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from prunekit_kernels.activations import activate
from prunekit_kernels.launch import INTERPRETER, architecture, launch, multiprocessors
from prunekit_kernels.segment_stats import reduce_segments, segments, store_segment_stats
from prunekit_kernels.tiles import (
    described_tile_products,
    grouped_tile,
    tile_products,
    tile_start,
)
from prunekit_kernels.tuning import Config, choose

Optional = torch.Tensor | None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _dual_tile(
    tile, x, gate, up, gate_bias, up_bias, h, bounds, of_tile, partials, segment_count,
    tokens, width, hidden, x_stride, gate_stride, up_stride,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    row_tile, column_tile = grouped_tile(tile, row_tiles, tl.cdiv(width, BLOCK_N), GROUP_M)
    if DESCRIPTOR:
        gate_sum, up_sum = described_tile_products(
            x, gate, up, row_tile, column_tile, hidden, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        gate_sum, up_sum = tile_products(
            x, gate, up, row_tile, column_tile, tokens, width, hidden,
            x_stride, gate_stride, up_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip

    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    if gate_bias is not None:
        gate_sum += tl.load(gate_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = activate(gate_sum, ACT)
    if up is not None:
        if up_bias is not None:
            up_sum += tl.load(up_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        value *= up_sum
    rounded = value.to(h.dtype.element_ty)

    local = tl.arange(0, BLOCK_M)
    rows = row_tile * BLOCK_M + local
    places = tile_start(h, row_tile, width, BLOCK_M) + (local[:, None] * width + columns[None, :])
    tl.store(places, rounded, mask=(rows < tokens)[:, None] & inside[None, :])
    if partials is not None:
        tl.debug_barrier()  # a thread reads back what others have stored
        store_segment_stats(
            h, gate_sum > 0.0, row_tile, column_tile, width, bounds, of_tile, partials,
            segment_count, BLOCK_M, BLOCK_N,
        )  # fmt: skip


# Registers a thread under Triton 3.9 (T 512, D 1536, F 8960, bf16, silu, no biases), none spilled:
#   sm_80 128, sm_100 80, gfx90a and gfx942 154; two blocks a multiprocessor. sm_90 178, one block
#   of twice the tile. With statistics 128, 120, 179 and 255, and as many blocks.
@triton.jit(do_not_specialize=["tokens", "segment_count"])
def _dual_product_kernel(
    x,  # [T, D], rows x_stride apart; a descriptor where DESCRIPTOR
    gate,  # [F, D], rows gate_stride apart; a descriptor where DESCRIPTOR
    up,  # as gate, or None
    gate_bias,  # [F] or None
    up_bias,  # [F] or None
    h,  # [T, F]
    bounds,  # [S, 2] or None, see Segments
    of_tile,  # [row_tiles + 1] or None
    partials,  # [5, S, F] or None: no statistics
    segment_count,
    tokens,
    width,
    hidden,
    x_stride,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    if PERSISTENT:
        tiles = tl.cdiv(tokens, BLOCK_M) * tl.cdiv(width, BLOCK_N)
        # Flat, the next tile's loads overlap this one's epilogue; but loads through pointers become
        # 2 bytes wide and synchronous in a flat loop (Triton 3.9).
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIPTOR):
            _dual_tile(
                tile, x, gate, up, gate_bias, up_bias, h, bounds, of_tile, partials, segment_count,
                tokens, width, hidden, x_stride, gate_stride, up_stride,
                ACT, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, EVEN_K, DESCRIPTOR,
            )  # fmt: skip
    else:
        _dual_tile(
            tl.program_id(0), x, gate, up, gate_bias, up_bias, h, bounds, of_tile, partials,
            segment_count, tokens, width, hidden, x_stride, gate_stride, up_stride,
            ACT, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, EVEN_K, DESCRIPTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _down_product_kernel(
    h,  # [T, F], contiguous
    down,  # [D, F], rows down_stride apart
    bias,  # [D] or None
    y,  # [T, D]
    tokens,
    width,
    hidden,
    down_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(hidden, BLOCK_N), GROUP_M
    )
    total, _ = tile_products(
        h, down, None, row_tile, column_tile, tokens, hidden, width,
        width, down_stride, 0, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip

    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < hidden
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    local = tl.arange(0, BLOCK_M)
    places = tile_start(y, row_tile, hidden, BLOCK_M) + (local[:, None] * hidden + columns)
    written = (row_tile * BLOCK_M + local < tokens)[:, None] & inside[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=written)


def _tile(rows: int, columns: int, depth: int, warps: int, stages: int, **more) -> Config:
    return {
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "BLOCK_K": depth,
        "GROUP_M": 8,
        "num_warps": warps,
        "num_stages": stages,
        **more,
    }


def _default_dual(arch: str, dtype: torch.dtype, tokens: int, *, stats: bool) -> Config:
    if arch == INTERPRETER:
        return _tile(32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return _tile(64, 32, 32, 4, 2)
    rows = 64 if tokens <= 64 else 128
    if arch.startswith("gfx"):
        return _tile(rows, 64, 64, 4, 2)
    if arch == "sm_90" and tokens > 64:  # measured on an H200
        return _tile(128, 128, 64, 8, 3, DESCRIPTOR=True)
    if stats and arch == "sm_80":
        # Statistics beside BLOCK_K 64 take 192 registers: one block a multiprocessor, not two.
        return _tile(rows, 64, 32, rows // 16, 4)
    return _tile(rows, 64, 64, rows // 16, 3)


def _default_down(arch: str, dtype: torch.dtype, tokens: int, hidden: int) -> Config:
    if arch == INTERPRETER:
        return _tile(32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return _tile(64, 64, 32, 4, 2)
    stages = 2 if arch.startswith("gfx") else 3
    # h·downᵀ has few tiles and a long sum for each: smaller ones where the card would stay idle.
    large = triton.cdiv(tokens, 128) * triton.cdiv(hidden, 128)
    if arch == "sm_90":  # measured on an H200
        small = tokens <= 64 or large < 0.9 * multiprocessors(arch)
        return _tile(64, 64, 64, 4, 4) if small else _tile(128, 128, 64, 4, 4)
    if large >= multiprocessors(arch):
        # BLOCK_K 64 takes 156 registers there: one block a multiprocessor, not two.
        return _tile(128, 128, 32, 8, 4) if arch == "sm_80" else _tile(128, 128, 64, 8, stages)
    return _tile(64 if tokens <= 64 else 128, 64, 64, 4, stages)


# What is worth measuring on a GPU. Those of two stages fit an AMD compute unit's 64 KB of LDS;
# those that some architecture cannot run are for the others.
CANDIDATES: dict[str, list[Config]] = {
    "dual_product": [
        _tile(128, 64, 64, 8, 3),
        _tile(128, 64, 32, 8, 4),
        _tile(64, 64, 64, 4, 4),
        _tile(128, 128, 64, 8, 3),
        _tile(128, 64, 64, 8, 3, PERSISTENT=2),
        _tile(128, 64, 64, 8, 3, DESCRIPTOR=True),
        _tile(128, 64, 64, 8, 3, DESCRIPTOR=True, PERSISTENT=2),
        _tile(128, 128, 64, 8, 3, DESCRIPTOR=True, PERSISTENT=1),
        _tile(128, 128, 64, 8, 4),
        _tile(128, 128, 64, 8, 3, DESCRIPTOR=True),
        _tile(128, 64, 64, 4, 2),
        _tile(128, 128, 32, 8, 2),
    ],
    "down_product": [
        _tile(128, 128, 64, 8, 3),
        _tile(128, 128, 32, 8, 4),
        _tile(128, 256, 64, 8, 3),
        _tile(256, 128, 64, 8, 3),
        _tile(128, 128, 64, 4, 4),
        _tile(128, 64, 64, 4, 3),
        _tile(128, 64, 64, 4, 4),
        _tile(64, 128, 64, 4, 4),
        _tile(64, 64, 64, 4, 4),
        _tile(128, 128, 64, 8, 2),
        _tile(128, 64, 64, 4, 2),
        _tile(64, 64, 64, 4, 2),
    ],
}
CANDIDATES["dual_product_stats"] = CANDIDATES["dual_product"]


def _described(tensor: Optional, rows: int, columns: int) -> TensorDescriptor | None:
    return None if tensor is None else TensorDescriptor.from_tensor(tensor, [rows, columns])


def _describable(arch: str, *tensors: Optional) -> bool:
    """Whether hardware copies take these matrices: bases and rows on multiples of 16 bytes."""
    capable = arch == INTERPRETER or (arch.startswith("sm_") and int(arch[3:]) >= 90)
    return capable and all(
        t is None
        or (t.numel() and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0)
        for t in tensors
    )


def _dual_product(x, gate, up, gate_bias, up_bias, spans, act):
    """Return h and, where spans are given, prompt_stats and token_stats."""
    (tokens, hidden), width = x.shape, gate.shape[0]
    stats, arch = spans is not None, architecture(x.device)
    default = _default_dual(arch, x.dtype, tokens, stats=stats)
    name = "dual_product_stats" if stats else "dual_product"
    config = dict(choose(name, arch, x.dtype, tokens, hidden, width, default=default))
    per_multiprocessor = config.pop("PERSISTENT", 0)
    described = config.pop("DESCRIPTOR", False) and _describable(arch, x, gate, up)
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")

    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(width, block_n)
    programs = tiles
    if per_multiprocessor:
        programs = min(tiles, per_multiprocessor * multiprocessors(arch))
    factors = x, gate, up
    if described:
        shapes = (block_m, block_k), (block_n, block_k), (block_n, block_k)
        factors = (_described(t, *s) for t, s in zip(factors, shapes, strict=True))

    h = x.new_empty((tokens, width))
    where = partials = None
    if stats:
        where = segments(spans, tokens, block_m, x.device)
        partials = x.new_empty((5, len(where.bounds), width), dtype=torch.float32)
    launch(
        _dual_product_kernel,
        (programs,),
        *factors,
        gate_bias,
        up_bias,
        h,
        where and where.bounds,
        where and where.of_tile,
        partials,
        0 if where is None else len(where.bounds),
        tokens,
        width,
        hidden,
        x.stride(0),
        gate.stride(0),
        0 if up is None else up.stride(0),
        ACT=act,
        EVEN_K=hidden % block_k == 0,
        DESCRIPTOR=bool(described),
        PERSISTENT=bool(per_multiprocessor),
        enable_fp_fusion=True,
        **config,
    )
    return (h,) if where is None else (h, *reduce_segments(partials, where.of_prompt))


def _down_product(h, down, bias):
    (tokens, width), hidden = h.shape, down.shape[0]
    arch = architecture(h.device)
    default = _default_down(arch, h.dtype, tokens, hidden)
    config = choose("down_product", arch, h.dtype, tokens, hidden, width, default=default)
    y = h.new_empty((tokens, hidden))
    tiles = triton.cdiv(tokens, config["BLOCK_M"]) * triton.cdiv(hidden, config["BLOCK_N"])
    launch(
        _down_product_kernel,
        (tiles,),
        h,
        down,
        bias,
        y,
        tokens,
        width,
        hidden,
        down.stride(0),
        EVEN_K=width % config["BLOCK_K"] == 0,
        enable_fp_fusion=True,
        **config,
    )
    return y


def _check(x: torch.Tensor, gate: torch.Tensor, up: Optional, down: torch.Tensor) -> None:
    for name, t in {"x": x, "gate": gate, "up": up, "down": down}.items():
        if t is None:
            continue
        if t.dtype not in _DTYPES or t.dtype != x.dtype:
            raise ValueError(
                f"gated_mlp: the Triton kernels take x, gate, up and down all in bfloat16, float16 "
                f"or float32, got x in {x.dtype} and {name} in {t.dtype}; convert them, or use "
                f"PRUNEKIT_BACKEND=reference"
            )
        if t.stride(-1) != 1 or (t.shape[0] > 1 and t.stride(0) >= 2**23):
            raise ValueError(
                f"gated_mlp: {name}'s rows must have unit stride and lie less than 2**23 elements "
                f"apart, got strides {t.stride()}; call .contiguous()"
            )


def gated_mlp_prefill(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    act: int,
) -> torch.Tensor:
    """Compute down(act(gate(x))·up(x)), or down(act(gate(x))) for a plain MLP, for many tokens.

    Args:
        x: [T, D], bf16/fp16/fp32, unit stride along D.
        gate: [F, D], x's dtype, unit stride along D, rows any stride apart.
        up: as gate, or None for a plain MLP.
        down: [D, F], unit stride along F.
        gate_bias, up_bias: [F] or None. down_bias: [D] or None. Contiguous.
        act: an activation's code.

    Returns:
        y [T, D] in x's dtype.

    Raises:
        ValueError: dtypes or strides are not as above.

    Cost:
        6·T·D·F FLOP (4·T·D·F without up); of width F only h is written and read, 2·T·F·b bytes.
    """
    _check(x, gate, up, down)
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(x):
        (h,) = _dual_product(x, gate, up, gate_bias, up_bias, None, act)
        return _down_product(h, down, down_bias)


def gated_mlp_prefill_stats(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    down: torch.Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    spans: torch.Tensor,
    act: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the same, with the statistics of gated_act_stats on the way.

    They are taken of h as rounded to its dtype. A gate is open where its fp32 pre-activation, which
    is never rounded here, is positive.

    Args:
        x to down_bias, act: as for `gated_mlp_prefill`.
        spans: [P, 2], int64, on the CPU: each prompt's rows, ascending and disjoint.

    Returns:
        y [T, D] and h [T, F] in x's dtype; prompt_stats [2, P, F] and token_stats [3, F] in fp32.

    Raises:
        ValueError: dtypes or strides are not as above.

    Cost:
        That of `gated_mlp_prefill`, and 40·F·S bytes, S being at most P and the row tiles together.
    """
    _check(x, gate, up, down)
    with torch.cuda.device_of(x):
        h, prompt_stats, token_stats = _dual_product(x, gate, up, gate_bias, up_bias, spans, act)
        return _down_product(h, down, down_bias), h, prompt_stats, token_stats
