"""The backward of the whole gated MLP, which recomputes what the forward did not keep.

First a kernel rebuilds g = x·gateᵀ and u = x·upᵀ tile by tile beside dh = grad_y·down, and leaves
dg, du and h in x's dtype. Then plain products give the gradients of x and of the weights, and
ordered sums those of the biases. No atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from prunekit_kernels.activations import activate, activate_grad
from prunekit_kernels.launch import architecture, launch
from prunekit_kernels.tiles import grouped_tile
from prunekit_kernels.tuning import Config, choose

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GROUP_M = 8  # rows of tiles that run together, so that what they share stays in the L2 cache

_SUM_ROWS = 16
_SUM_COLUMNS = 128
_SUM_SPLITS = 32  # at most; the workspace stays small, and each owner's sum short


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Config:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": stages,
    }


_PRODUCTS = [
    _config(64, 128, 64, 4, 3),
    _config(128, 128, 32, 8, 2),
    _config(128, 128, 32, 8, 4),
    _config(128, 128, 64, 8, 3),
    _config(128, 256, 64, 8, 3),
]
CANDIDATES: dict[str, list[Config]] = {
    "backward_hidden": [
        _config(64, 64, 32, 4, 4),
        _config(64, 64, 64, 4, 3),
        _config(128, 64, 32, 8, 2),
        _config(128, 64, 32, 8, 4),
        _config(128, 64, 64, 8, 3),
    ],
    "grad_x": _PRODUCTS,
    "grad_weight": _PRODUCTS,
}


# In all kernels a tile's corner is an int64 scalar and its inner offsets are int32: blocks times
# strides stay far below 2³¹, and offsets in 32 bits leave registers to the accumulators.
@triton.jit(do_not_specialize=["tokens"])
def _backward_hidden_kernel(
    grad_y,  # [T, D], rows grad_y_stride apart, or None where only h is wanted
    x,  # [T, D]
    gate,  # [F, D]
    up,  # [F, D], or None
    down,  # [D, F]
    gate_bias,  # [F], or None
    up_bias,  # [F], or None
    grad_gate,  # dg [T, F], or None
    grad_up,  # du [T, F], or None
    h,  # [T, F], or None
    tokens,
    hidden,
    width,
    grad_y_stride,
    x_stride,
    gate_stride,
    up_stride,
    down_stride,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_M
    )
    first_row = row_tile.to(tl.int64) * BLOCK_M
    first_column = column_tile.to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_inside = (first_row + m < tokens)[:, None]
    column_inside = (column_tile * BLOCK_N + n < width)[None, :]

    x += first_row * x_stride
    gate += first_column * gate_stride
    x_places = m[:, None] * x_stride + k[None, :]
    gate_places = n[None, :] * gate_stride + k[:, None]
    if up is not None:
        up += first_column * up_stride
        up_places = n[None, :] * up_stride + k[:, None]
    if grad_y is not None:
        grad_y += first_row * grad_y_stride
        down += first_column
        grad_y_places = m[:, None] * grad_y_stride + k[None, :]
        down_places = k[:, None] * down_stride + n[None, :]

    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in range(0, hidden, BLOCK_K):
        depth = k < hidden - low
        left = row_inside & depth[None, :]
        right = depth[:, None] & column_inside
        x_tile = tl.load(x + low + x_places, mask=left, other=0.0)
        gate_tile = tl.load(gate + low + gate_places, mask=right, other=0.0)
        g = tl.dot(x_tile, gate_tile, g, input_precision="ieee")
        if up is not None:
            up_tile = tl.load(up + low + up_places, mask=right, other=0.0)
            u = tl.dot(x_tile, up_tile, u, input_precision="ieee")
        if grad_y is not None:
            grad_y_tile = tl.load(grad_y + low + grad_y_places, mask=left, other=0.0)
            corner = down + tl.cast(low, tl.int64) * down_stride
            down_tile = tl.load(corner + down_places, mask=right, other=0.0)
            dh = tl.dot(grad_y_tile, down_tile, dh, input_precision="ieee")

    columns = first_column + n
    if gate_bias is not None:
        bias = tl.load(gate_bias + columns, mask=columns < width, other=0.0)
        g += bias.to(tl.float32)[None, :]
    if up_bias is not None:
        bias = tl.load(up_bias + columns, mask=columns < width, other=0.0)
        u += bias.to(tl.float32)[None, :]

    corner = first_row * width + first_column
    places = m[:, None] * width + n[None, :]
    inside = row_inside & column_inside
    dtype = x.dtype.element_ty
    if grad_gate is not None:
        dg = dh * activate_grad(g, ACT)
        if up is not None:
            dg *= u
        tl.store(grad_gate + corner + places, dg.to(dtype), mask=inside)
    if grad_up is not None:
        tl.store(grad_up + corner + places, (dh * activate(g, ACT)).to(dtype), mask=inside)
    if h is not None:
        value = activate(g, ACT)
        if up is not None:
            value *= u
        tl.store(h + corner + places, value.to(dtype), mask=inside)


@triton.jit
def _add_product(
    accumulator,  # [BLOCK_M, BLOCK_N]
    a,  # this tile's corner of [T, F], rows a_stride apart
    b,  # this tile's corner of [F, D], rows b_stride apart
    a_stride,
    b_stride,
    row_inside,
    column_inside,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    a_places = tl.arange(0, BLOCK_M)[:, None] * a_stride + k[None, :]
    b_places = k[:, None] * b_stride + tl.arange(0, BLOCK_N)[None, :]
    for low in range(0, width, BLOCK_K):
        depth = k < width - low
        a_tile = tl.load(a + low + a_places, mask=row_inside & depth[None, :], other=0.0)
        b_corner = b + tl.cast(low, tl.int64) * b_stride
        b_tile = tl.load(b_corner + b_places, mask=depth[:, None] & column_inside, other=0.0)
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision="ieee")
    return accumulator


# dg·gate and du·up walk over F one after the other into one accumulator.
@triton.jit(do_not_specialize=["tokens"])
def _grad_x_kernel(
    grad_gate,  # dg [T, F]
    gate,  # [F, D], rows gate_stride apart
    grad_up,  # du [T, F], or None
    up,  # [F, D], rows up_stride apart, or None
    grad_x,  # [T, D]
    tokens,
    hidden,
    width,
    gate_stride,
    up_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(hidden, BLOCK_N), GROUP_M
    )
    first_row = row_tile.to(tl.int64) * BLOCK_M
    first_column = column_tile.to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    row_inside = (first_row + m < tokens)[:, None]
    column_inside = (column_tile * BLOCK_N + n < hidden)[None, :]

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = _add_product(
        total,
        grad_gate + first_row * width,
        gate + first_column,
        width,
        gate_stride,
        row_inside,
        column_inside,
        width,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if up is not None:
        total = _add_product(
            total,
            grad_up + first_row * width,
            up + first_column,
            width,
            up_stride,
            row_inside,
            column_inside,
            width,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    out = grad_x + first_row * hidden + first_column
    places = m[:, None] * hidden + n[None, :]
    tl.store(out + places, total.to(grad_x.dtype.element_ty), mask=row_inside & column_inside)


@triton.jit(do_not_specialize=["tokens"])
def _grad_weight_kernel(
    a,  # [T, M], rows a_stride apart
    b,  # [T, N], rows b_stride apart
    out,  # aᵀ·b [M, N]
    tokens,
    height,
    width,
    a_stride,
    b_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_M
    )
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first_row = row_tile.to(tl.int64) * BLOCK_M
    first_column = column_tile.to(tl.int64) * BLOCK_N
    row_inside = row_tile * BLOCK_M + m < height
    column_inside = column_tile * BLOCK_N + n < width
    a += first_row
    b += first_column
    a_places = m[:, None] + k[None, :] * a_stride
    b_places = k[:, None] * b_stride + n[None, :]

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in range(0, tokens, BLOCK_K):
        depth = k < tokens - low
        token = tl.cast(low, tl.int64)
        left = row_inside[:, None] & depth[None, :]
        right = depth[:, None] & column_inside[None, :]
        a_tile = tl.load(a + token * a_stride + a_places, mask=left, other=0.0)
        b_tile = tl.load(b + token * b_stride + b_places, mask=right, other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")

    out += first_row * width + first_column
    places = m[:, None] * width + n[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def _column_sums_kernel(
    a,  # [R, N], rows stride apart
    sums,  # [programs, N]: of share rows each
    rows,
    share,
    width,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    first = program * share
    last = tl.minimum(first + share, rows)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for low in range(first, last, BLOCK_R):
        places = tl.cast(low, tl.int64) * stride + r[:, None] * stride + columns[None, :]
        mask = (low + r < last)[:, None] & inside[None, :]
        total += tl.load(a + places, mask=mask, other=0.0).to(tl.float32)
    out = sums + program.to(tl.int64) * width + columns
    tl.store(out, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside)


def _column_sums(a: torch.Tensor) -> torch.Tensor:
    """Add up the rows of [R, N] in fp32 and a fixed order; returns [N] in a's dtype."""
    rows, width = a.shape
    share = max(triton.cdiv(rows, _SUM_SPLITS), _SUM_ROWS)
    splits = triton.cdiv(rows, share)
    partials = a.new_empty((splits, width), dtype=torch.float32)
    sums = a.new_empty(width)
    for source, out, part, programs in ((a, partials, share, splits), (partials, sums, splits, 1)):
        launch(
            _column_sums_kernel,
            (programs, triton.cdiv(width, _SUM_COLUMNS)),
            source,
            out,
            len(source),
            part,
            width,
            source.stride(0),
            BLOCK_R=_SUM_ROWS,
            BLOCK_N=_SUM_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sums


def default_config(kernel: str, arch: str, dtype: torch.dtype) -> Config:
    """Return the tiles to start from, which leave every accumulator in registers."""
    if arch == "interpreter":
        return _config(32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return (
            _config(64, 32, 16, 8, 2) if kernel == "backward_hidden" else _config(64, 64, 16, 8, 2)
        )
    hidden = kernel == "backward_hidden"
    if arch.startswith("gfx"):
        return _config(128, 64, 32, 8, 2) if hidden else _config(128, 128, 32, 8, 2)
    if arch in ("sm_90", "sm_100"):
        return _config(128, 64, 64, 8, 3) if hidden else _config(128, 128, 64, 8, 3)
    # A K of 64 would spill three accumulators' factors on sm_80.
    return _config(128, 64, 32, 8, 4) if hidden else _config(128, 128, 32, 8, 4)


def _options(kernel: str, t: torch.Tensor, tokens: int, *shape: int) -> Config:
    arch = architecture(t.device)
    default = default_config(kernel, arch, t.dtype)
    chosen = choose(kernel, arch, t.dtype, tokens, *shape, default=default)
    return {**chosen, "GROUP_M": _GROUP_M, "enable_fp_fusion": True}


def _tiles(options: Config, rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(columns, options["BLOCK_N"]),)


def _grad_weight(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (tokens, height), width = a.shape, b.shape[1]
    options = _options("grad_weight", a, tokens, height, width)
    out = a.new_empty((height, width))
    launch(
        _grad_weight_kernel,
        _tiles(options, height, width),
        a,
        b,
        out,
        tokens,
        height,
        width,
        a.stride(0),
        b.stride(0),
        **options,
    )
    return out


def _grad_x(
    dg: torch.Tensor, gate: torch.Tensor, du: torch.Tensor | None, up: torch.Tensor | None
) -> torch.Tensor:
    (tokens, width), hidden = dg.shape, gate.shape[1]
    options = _options("grad_x", dg, tokens, hidden, width)
    out = dg.new_empty((tokens, hidden))
    launch(
        _grad_x_kernel,
        _tiles(options, tokens, hidden),
        dg,
        gate,
        du,
        up,
        out,
        tokens,
        hidden,
        width,
        gate.stride(0),
        0 if up is None else up.stride(0),
        **options,
    )
    return out


def _hidden(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    act: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return those of dg, du and h, each [T, F], that are wanted."""
    (tokens, hidden), width = x.shape, gate.shape[0]
    found = tuple(x.new_empty((tokens, width)) if w else None for w in wanted)
    if not any(wanted):
        return found
    options = _options("backward_hidden", x, tokens, hidden, width)
    launch(
        _backward_hidden_kernel,
        _tiles(options, tokens, width),
        grad_y if wanted[0] or wanted[1] else None,
        x,
        gate,
        up,
        down,
        gate_bias,
        up_bias,
        *found,
        tokens,
        hidden,
        width,
        grad_y.stride(0),
        x.stride(0),
        gate.stride(0),
        0 if up is None else up.stride(0),
        down.stride(0),
        ACT=act,
        **options,
    )
    return found


def gated_mlp_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    act: int,
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Differentiate down(act(gate(x))·up(x)), keeping nothing of width F from the forward.

    g, u and dh stay in fp32; dg, du and h are rounded to x's dtype before the products that use
    them, as torch would round them.

    Args:
        grad_y: [T, D], x's dtype.
        x: [T, D], bf16/fp16/fp32, unit stride along D, as every matrix here along its rows.
        gate: [F, D], x's dtype.
        up: [F, D], or None for a plain MLP.
        down: [D, F].
        gate_bias, up_bias: [F] or None.
        act: an activation's code.
        needed: of which of x, gate, up, down, gate_bias, up_bias and down_bias the gradient is
            wanted.

    Returns:
        Seven gradients in that order, x's dtype, contiguous; None where not needed or absent.

    Raises:
        ValueError: the dtype is not supported.

    Cost:
        18·T·D·F FLOP (10·T·D·F without up), and 3·T·F·b bytes of workspace for dg, du and h.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"gated_mlp: the Triton kernels take bfloat16, float16 or float32, got {x.dtype}; "
            "convert x and the weights, or use PRUNEKIT_BACKEND=reference"
        )
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()  # that of a sum is one number, expanded
    need_x, need_gate, need_up, need_down, need_gate_bias, need_up_bias, need_down_bias = needed
    need_up, need_up_bias = need_up and up is not None, need_up_bias and up_bias is not None
    need_gate_bias = need_gate_bias and gate_bias is not None
    wanted = (
        need_x or need_gate or need_gate_bias,
        (need_x and up is not None) or need_up or need_up_bias,
        need_down,
    )
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(x):
        dg, du, h = _hidden(grad_y, x, gate, up, down, gate_bias, up_bias, act, wanted)
        return (
            _grad_x(dg, gate, du, up) if need_x else None,
            _grad_weight(dg, x) if need_gate else None,
            _grad_weight(du, x) if need_up else None,
            _grad_weight(grad_y, h) if need_down else None,
            _column_sums(dg) if need_gate_bias else None,
            _column_sums(du) if need_up_bias else None,
            _column_sums(grad_y) if need_down_bias else None,
        )
