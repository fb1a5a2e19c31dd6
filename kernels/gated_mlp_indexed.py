"""The gated MLP over the neurons that an index names, read where they lie in the dense weights.

A plan can be tried so without compacting. Rows of gate and up are read as if they were compact;
columns of down are not, see `gated_mlp_indexed_triton` for what they cost. First kernel: h of the
named neurons. Second: the down product, over splits of the neurons where there are few tokens,
which `combine` then adds in order. No atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from prunekit_kernels.activations import activate
from prunekit_kernels.gated_mlp_decode import check_dtypes, combine
from prunekit_kernels.launch import INTERPRETER, architecture, launch, multiprocessors
from prunekit_kernels.tuning import Config, choose

_MOST_SPLITS = 32
_LEAST_STEPS = 4  # of a split: below, the workspace costs more than another program wins
# Of the second kernel, a multiprocessor: more to decode, where gathers wait and little else does.
_PROGRAMS = {"decode": 4, "prefill": 2}

# Worth measuring on a GPU with 16-bit weights: three for the few tokens of decoding, then three for
# prefill. All fit the 64 KiB of AMD's local memory.
CANDIDATES: dict[str, list[Config]] = {
    name: [
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    ]
    for name in ("indexed_hidden", "indexed_down")
}


# Token blocks come first in both grids: programs side by side read the same weights.
@triton.jit(do_not_specialize=["tokens"])
def _indexed_hidden_kernel(
    x,  # [T, D], rows x_stride apart
    gate,  # [F, D], rows gate_stride apart
    up,  # [F, D], rows up_stride apart, or None
    index,  # [K], each in [0, F)
    gate_bias,  # [F] or None
    up_bias,  # [F] or None
    h,  # [T, K]
    tokens,
    hidden,
    kept,
    x_stride,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < kept
    neuron = tl.load(index + place, mask=inside, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_places = x + token[:, None] * x_stride + columns[None, :]
    gate_places = gate + neuron[:, None] * gate_stride + columns[None, :]
    if up is not None:
        up_places = up + neuron[:, None] * up_stride + columns[None, :]

    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in range(0, hidden, BLOCK_K):
        here = (low + columns < hidden)[None, :]
        x_block = tl.load(x_places + low, mask=(token < tokens)[:, None] & here, other=0.0)
        weight = tl.load(gate_places + low, mask=inside[:, None] & here, other=0.0)
        g = tl.dot(x_block, tl.trans(weight), g, input_precision="ieee")
        if up is not None:
            weight = tl.load(up_places + low, mask=inside[:, None] & here, other=0.0)
            u = tl.dot(x_block, tl.trans(weight), u, input_precision="ieee")

    if gate_bias is not None:
        g += tl.load(gate_bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = activate(g, ACT)
    if up is not None:
        if up_bias is not None:
            u += tl.load(up_bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
        value *= u
    mask = (token < tokens)[:, None] & inside[None, :]
    tl.store(h + token[:, None] * kept + place[None, :], value.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _indexed_down_kernel(
    h,  # [T, K]
    down,  # [D, F], rows down_stride apart
    index,  # [K], each in [0, F)
    bias,  # [D], or None where out is a workspace
    out,  # [T, D] in h's dtype, or [splits, T, D] in fp32
    tokens,
    kept,
    hidden,
    down_stride,
    split_width,  # neurons of a split, a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < hidden
    places = tl.arange(0, BLOCK_K)
    h_places = h + token[:, None] * kept + places[None, :]
    down_rows = down + rows * down_stride

    split = tl.program_id(2)
    first = split * split_width
    last = tl.minimum(first + split_width, kept)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in range(first, last, BLOCK_K):
        here = low + places < kept
        h_block = tl.load(h_places + low, mask=(token < tokens)[:, None] & here[None, :], other=0.0)
        neuron = tl.load(index + low + places, mask=here, other=0).to(tl.int64)
        weight_places = down_rows[:, None] + neuron[None, :]
        weight = tl.load(weight_places, mask=inside[:, None] & here[None, :], other=0.0)
        sums = tl.dot(h_block, tl.trans(weight), sums, input_precision="ieee")

    if bias is not None:
        sums += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = out + (split.to(tl.int64) * tokens + token[:, None]) * hidden + rows[None, :]
    mask = (token < tokens)[:, None] & inside[None, :]
    tl.store(y, sums.to(out.dtype.element_ty), mask=mask)


def default_config(arch: str, dtype: torch.dtype, tokens: int) -> Config:
    """Return 16 rows of tokens for decoding, 64 or 128 for prefill, 16-byte loads along rows."""
    if arch == INTERPRETER:
        tile = (16, 16, 32)
    elif dtype == torch.float32:  # no tensor cores: the products' operands take registers
        tile = (16 if tokens <= 16 else 64, 32, 32)
    elif tokens <= 16:
        tile = (16, 32, 128)
    else:
        tile = (64 if tokens <= 64 else 128, 64, 64)
    config = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    stages = 2 if arch.startswith("gfx") else 3
    return config | {"num_warps": 8 if tile[0] == 128 else 4, "num_stages": stages}


def split_steps(arch: str, tokens: int, tiles: int, steps: int) -> int:
    """Return how many of a product's steps one program takes, where it has this many tiles."""
    programs = _PROGRAMS["decode" if tokens <= 16 else "prefill"] * multiprocessors(arch)
    wanted = programs // max(tiles, 1)
    splits = max(min(wanted, steps // _LEAST_STEPS, _MOST_SPLITS), 1)
    return max(triton.cdiv(steps, splits), 1)


def gated_mlp_indexed_triton(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    index: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    act: int,
) -> torch.Tensor:
    """Apply the MLP of the named neurons alone, without copying their weights.

    h = act(x·gate[index]ᵀ + gate_bias[index])·(x·up[index]ᵀ + up_bias[index]), rounded to x's
    dtype, and y = h·down[:, index]ᵀ + down_bias.

    Args:
        x: [T, D], bf16/fp16/fp32, unit stride along D.
        gate, up: [F, D], x's dtype, unit stride along D, any row stride; up may be None.
        down: [D, F], x's dtype, unit stride along F, any row stride.
        index: [K], int32 or int64, contiguous, each in [0, F): not checked here.
        gate_bias, up_bias: [F] or None. down_bias: [D] or None.
        act: an activation's code.

    Returns:
        [T, D], x's dtype, contiguous.

    Raises:
        ValueError: the dtypes are not as above.

    Cost:
        6·T·D·K FLOP. To decode, 2·D·K·b bytes of gate and up, in 16-byte loads. Columns of down are
        gathered an element a load, while memory moves 32-byte sectors. With b = 2 and an ascending
        index that keeps a fraction p evenly, that is D·F·b·(1 − (1 − p)^16) bytes instead of D·K·b:
        from p = 1/4 on, 99 % of the dense matrix. In no order, it is up to 32·D·K bytes.
    """
    check_dtypes("gated_mlp_indexed", x, gate, up, down)
    tokens, hidden = x.shape
    kept = index.shape[0]
    arch = architecture(x.device)
    default = default_config(arch, x.dtype, tokens)

    h = x.new_empty((tokens, kept))
    y = x.new_empty((tokens, hidden))
    if y.numel() == 0:
        return y
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(x):
        config = choose("indexed_hidden", arch, x.dtype, tokens, hidden, kept, default=default)
        launch(
            _indexed_hidden_kernel,
            (triton.cdiv(tokens, config["BLOCK_M"]), triton.cdiv(kept, config["BLOCK_N"])),
            x,
            gate,
            up,
            index,
            gate_bias,
            up_bias,
            h,
            tokens,
            hidden,
            kept,
            x.stride(0),
            gate.stride(0),
            0 if up is None else up.stride(0),
            ACT=act,
            enable_fp_fusion=True,
            **config,
        )
        config = choose("indexed_down", arch, x.dtype, tokens, hidden, kept, default=default)
        tiles = triton.cdiv(tokens, config["BLOCK_M"]), triton.cdiv(hidden, config["BLOCK_N"])
        steps = triton.cdiv(kept, config["BLOCK_K"])
        share = split_steps(arch, tokens, tiles[0] * tiles[1], steps)
        splits = max(triton.cdiv(steps, share), 1)
        partials = y if splits == 1 else y.new_empty((splits, *y.shape), dtype=torch.float32)
        launch(
            _indexed_down_kernel,
            (*tiles, splits),
            h,
            down,
            index,
            down_bias if splits == 1 else None,
            partials,
            tokens,
            kept,
            hidden,
            down.stride(0),
            share * config["BLOCK_K"],
            enable_fp_fusion=True,
            **config,
        )
        if splits > 1:
            combine(partials, down_bias, y)
    return y
