"""The gated MLP for the few tokens of decoding: every weight is read once, and nothing else counts.

First kernel: a program owns some rows of gate and up, walks along them, and writes their h. Second:
a program owns some rows of down and one split of their columns, so that a narrow hidden size still
fills the GPU. Third: the splits are added in order, with the bias. No atomics: the same input gives
the same bits. Grids depend on shapes and architecture alone, so a CUDA graph can hold the launches.
"""

import torch
import triton
import triton.language as tl

from prunekit_kernels.activations import activate
from prunekit_kernels.launch import INTERPRETER, architecture, launch, multiprocessors
from prunekit_kernels.tuning import Config, choose

MOST_TOKENS = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_MOST_SPLITS = 32  # the workspace then costs 64·T / (3·F) of the weights' bytes
_LEAST_STEPS = 2  # of a split: below, filling the pipeline costs more than another program wins
# Of the second kernel, a multiprocessor, for one token and for several, whose workspace is larger.
_PROGRAMS = (4, 2)
_COMBINE_COLUMNS = 256

# Worth measuring on a GPU, for each kernel; the first seven are for several tokens, where a block
# of rows is one operand of the tensor cores, the others for a single one. Those that AMD's 64 KiB
# of local memory cannot hold are for the others.
CANDIDATES: dict[str, list[Config]] = {
    name: [
        {"BLOCK_R": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        {"BLOCK_R": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 2},
        {"BLOCK_R": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
        {"BLOCK_R": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5},
        {"BLOCK_R": 32, "BLOCK_K": 256, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 8, "BLOCK_K": 512, "num_warps": 4, "num_stages": 2},
        {"BLOCK_R": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 2},
        {"BLOCK_R": 16, "BLOCK_K": 512, "num_warps": 8, "num_stages": 2},
        {"BLOCK_R": 8, "BLOCK_K": 512, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 4, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 2},
        {"BLOCK_R": 8, "BLOCK_K": 256, "num_warps": 2, "num_stages": 3},
    ]
    for name in ("decode_hidden", "decode_down")
}


@triton.jit
def _add_products(sums, weight, x, BLOCK_T: tl.constexpr):
    """Add weight [R, K] times x [BLOCK_T, K]: for one token apart, [R, K]; for more, [R, T]."""
    if BLOCK_T == 1:
        sums += weight.to(tl.float32) * x.to(tl.float32)
    else:
        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
    return sums


@triton.jit
def _with_bias(sums, bias, rows, inside, BLOCK_T: tl.constexpr):
    """Finish the sums as [R, T], each row with its bias."""
    if BLOCK_T == 1:
        sums = tl.sum(sums, 1, keep_dims=True)
    if bias is not None:
        sums += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _decode_hidden_kernel(
    x,  # [T, D], rows x_stride apart
    gate,  # [F, D], rows gate_stride apart
    up,  # [F, D], rows up_stride apart, or None
    gate_bias,  # [F] or None
    up_bias,  # [F] or None
    index,  # [K], the neurons to compute, or None for all: K = F
    h,  # [T, F]
    tokens,
    hidden,
    kept,  # K
    width,  # F
    x_stride,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,  # 1, or 16 for the tensor cores
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < kept
    if index is not None:
        rows = tl.load(index + rows, mask=inside, other=0).to(tl.int64)
    token = tl.arange(0, BLOCK_T).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_places = x + token[:, None] * x_stride + columns[None, :]
    gate_places = gate + rows[:, None] * gate_stride + columns[None, :]
    if up is not None:
        up_places = up + rows[:, None] * up_stride + columns[None, :]

    g = tl.zeros([BLOCK_R, BLOCK_K if BLOCK_T == 1 else BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_R, BLOCK_K if BLOCK_T == 1 else BLOCK_T], tl.float32)
    for low in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
        here = (low + columns < hidden)[None, :]
        x_block = tl.load(x_places + low, mask=(token < tokens)[:, None] & here, other=0.0)
        mask = inside[:, None] & here
        weight = tl.load(gate_places + low, mask=mask, other=0.0, eviction_policy="evict_first")
        g = _add_products(g, weight, x_block, BLOCK_T)
        if up is not None:
            weight = tl.load(up_places + low, mask=mask, other=0.0, eviction_policy="evict_first")
            u = _add_products(u, weight, x_block, BLOCK_T)

    value = activate(_with_bias(g, gate_bias, rows, inside, BLOCK_T), ACT)
    if up is not None:
        value *= _with_bias(u, up_bias, rows, inside, BLOCK_T)
    out = h + token[None, :] * width + rows[:, None]
    tl.store(out, value.to(h.dtype.element_ty), mask=inside[:, None] & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _decode_down_kernel(
    h,  # [T, F]
    down,  # [D, F], rows down_stride apart
    partials,  # [splits, T, D]
    tokens,
    width,
    hidden,
    down_stride,
    split_width,  # columns of a split, a multiple of BLOCK_K
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < hidden
    token = tl.arange(0, BLOCK_T).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    h_places = h + token[:, None] * width + columns[None, :]
    down_places = down + rows[:, None] * down_stride + columns[None, :]

    split = tl.program_id(1)
    first = split * split_width
    last = tl.minimum(first + split_width, width)
    sums = tl.zeros([BLOCK_R, BLOCK_K if BLOCK_T == 1 else BLOCK_T], tl.float32)
    for low in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        here = (low + columns < width)[None, :]
        h_block = tl.load(h_places + low, mask=(token < tokens)[:, None] & here, other=0.0)
        mask = inside[:, None] & here
        weight = tl.load(down_places + low, mask=mask, other=0.0, eviction_policy="evict_first")
        sums = _add_products(sums, weight, h_block, BLOCK_T)

    sums = _with_bias(sums, None, rows, inside, BLOCK_T)
    out = partials + (split.to(tl.int64) * tokens + token[None, :]) * hidden + rows[:, None]
    tl.store(out, sums, mask=inside[:, None] & (token < tokens)[None, :])


@triton.jit
def _decode_combine_kernel(
    partials,  # [SPLITS, T, D]
    bias,  # [D] or None
    y,  # [T, D]
    hidden,
    SPLITS: tl.constexpr,  # a constant, so that the loads of all splits are under way together
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tokens = tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + (split * tokens + token) * hidden + columns, mask=inside)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + columns, total.to(y.dtype.element_ty), mask=inside)


def default_config(
    arch: str, dtype: torch.dtype, tokens: int, rows: int, *, split: bool = False
) -> Config:
    """Return a configuration with 16-byte loads that gives every multiprocessor its programs.

    A program of few rows leaves more programs, one of many reads x (from the cache) less often.
    Its loads in flight, a step of every row for each stage but one, are 8 KiB or more a matrix.

    Args:
        arch, dtype, tokens: what the speed depends on.
        rows: of the matrix.
        split: whether several programs share a row, so that few rows are enough for all.
    """
    if arch == INTERPRETER:
        return {"BLOCK_R": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    if arch == "sm_90" and dtype.itemsize == 2:  # measured on an H200
        if tokens == 1:
            return {"BLOCK_R": 8, "BLOCK_K": 256, "num_warps": 2, "num_stages": 3}
        if split or rows >= 64 * multiprocessors(arch):
            return {"BLOCK_R": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    short = rows < 2 * 32 * multiprocessors(arch)
    step = 256 if tokens == 1 or short else 128
    stages = 2 if tokens == 1 or arch.startswith("gfx") else 3 if short else 4
    return {
        "BLOCK_R": 16 if tokens == 1 or short else 32,
        "BLOCK_K": step * 2 // dtype.itemsize,
        "num_warps": 4,
        "num_stages": stages,
    }


def split_count(arch: str, tokens: int, row_blocks: int, steps: int) -> int:
    """Return how many programs share a row of ``steps`` blocks of columns."""
    programs = _PROGRAMS[tokens > 1] * multiprocessors(arch)
    wanted = triton.cdiv(programs, max(row_blocks, 1))
    return max(min(wanted, steps // _LEAST_STEPS, _MOST_SPLITS), 1)


def _launch_options(config: Config) -> dict:
    """Return a configuration's blocks and compile options as the kernels name them."""
    return config | {"STAGES": config["num_stages"], "enable_fp_fusion": True}


def check_dtypes(name: str, x: torch.Tensor, *weights: torch.Tensor | None) -> None:
    """Raise ValueError unless all are of one dtype that the kernels multiply."""
    if x.dtype not in _DTYPES or any(w is not None and w.dtype != x.dtype for w in weights):
        got = ", ".join(str(w.dtype) for w in (x, *weights) if w is not None)
        raise ValueError(
            f"{name}: the Triton kernels take x and weights in one of bfloat16, float16 and "
            f"float32, got {got}; convert them, or use PRUNEKIT_BACKEND=reference"
        )


def combine(partials: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write the sum of partials [splits, T, D] over splits, plus bias [D], to y [T, D]."""
    splits, tokens, hidden = partials.shape
    launch(
        _decode_combine_kernel,
        (tokens, triton.cdiv(hidden, _COMBINE_COLUMNS)),
        partials,
        bias,
        y,
        hidden,
        SPLITS=splits,
        BLOCK=_COMBINE_COLUMNS,
        num_warps=2,
        enable_fp_fusion=True,
    )


def gated_mlp_decode(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    act: int,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply down(act(gate(x))·up(x)) to at most 16 tokens.

    h is rounded to x's dtype between the kernels: the tensor cores take it so, and it is what the
    prefill path and the statistics see. The sums before and after it are fp32.

    Args:
        x: [T, D], T <= 16, bf16/fp16/fp32, unit stride along D.
        gate, up: [F, D], x's dtype, unit stride along D, any row stride; up may be None.
        down: [D, F], x's dtype, unit stride along F, any row stride.
        gate_bias, up_bias: [F] or None. down_bias: [D] or None.
        act: an activation's code.
        index: [K], int32 or int64, contiguous, each in [0, F) and none twice: the neurons to
            compute with, the others counting as removed. None takes them all. Not checked here.

    Returns:
        [T, D], x's dtype, contiguous.

    Raises:
        ValueError: there are more than 16 tokens, or the dtypes are not as above.

    Cost:
        3·D·F·b bytes of memory traffic, 2·T·F·b for h and 8·splits·T·D for the workspace. Through
        an index 2·D·K·b for gate and up, and D·F·b still for down, which is read whole against an h
        with zeros: kept columns lie in nearly all of its 32-byte sectors (99 % where a quarter is
        kept), and reading no others took three times as long on an H200.
    """
    check_dtypes("gated_mlp_decode", x, gate, up, down)
    tokens, hidden = x.shape
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"gated_mlp_decode: got {tokens} tokens, expected at most {MOST_TOKENS}; use gated_mlp"
        )
    width = gate.shape[0]
    kept = width if index is None else len(index)
    arch = architecture(x.device)
    block_t = 1 if tokens == 1 else MOST_TOKENS

    h = (x.new_empty if index is None else x.new_zeros)((tokens, width))
    y = x.new_empty((tokens, hidden))
    if y.numel() == 0:
        return y
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(x):
        default = default_config(arch, x.dtype, tokens, kept)
        config = choose("decode_hidden", arch, x.dtype, tokens, hidden, kept, default=default)
        launch(
            _decode_hidden_kernel,
            (triton.cdiv(kept, config["BLOCK_R"]),),
            x,
            gate,
            up,
            gate_bias,
            up_bias,
            index,
            h,
            tokens,
            hidden,
            kept,
            width,
            x.stride(0),
            gate.stride(0),
            0 if up is None else up.stride(0),
            ACT=act,
            BLOCK_T=block_t,
            **_launch_options(config),
        )
        default = default_config(arch, x.dtype, tokens, hidden, split=True)
        config = choose("decode_down", arch, x.dtype, tokens, hidden, width, default=default)
        row_blocks = triton.cdiv(hidden, config["BLOCK_R"])
        steps = triton.cdiv(width, config["BLOCK_K"])
        split_steps = max(triton.cdiv(steps, split_count(arch, tokens, row_blocks, steps)), 1)
        splits = max(triton.cdiv(steps, split_steps), 1)
        partials = x.new_empty((splits, tokens, hidden), dtype=torch.float32)
        launch(
            _decode_down_kernel,
            (row_blocks, splits),
            h,
            down,
            partials,
            tokens,
            width,
            hidden,
            down.stride(0),
            split_steps * config["BLOCK_K"],
            BLOCK_T=block_t,
            **_launch_options(config),
        )
        combine(partials, down_bias, y)
    return y
