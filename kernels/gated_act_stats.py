"""h = act(gate)·up and the sums over each prompt's rows, in one pass and a small second one.

First pass: a program owns some rows of one prompt and BLOCK_F columns, walks down the rows, and
keeps its sums in registers; a thread always holds the same columns, so nothing is exchanged between
threads. It leaves its sums in a workspace. Second pass: the workspace's rows are added in a fixed
order. No atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from prunekit_kernels.activations import activate
from prunekit_kernels.launch import architecture, launch
from prunekit_kernels.segment_stats import reduce_segments

_THREADS = 64  # a program; each holds 16 bytes of a row
_REGISTERS = 64  # a thread, at most, on NVIDIA in 16-bit dtypes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_PROGRAMS = 512  # about four a multiprocessor: prefetched rows keep enough bytes in flight
_MOST_ROWS = 256  # a program, on average: from here on the workspace costs under 3 % of the bytes
_LEAST_ROWS = 16  # a program, on average: below, starting it costs more than its rows
_COUNT_ROWS = 65535  # a program, at most: two counts share 32 bits


# Registers decide how many programs run: sums and rows in flight must fit 64 of NVIDIA's, which is
# half the occupancy of the same kernel without sums. Three things make them fit: counts of two
# columns share a register, the maximum stays in h's dtype, where it is exact, and for 16-bit dtypes
# the compiler is told the limit. Untold, Triton 3.9 takes up to 70, and none is spilled either way;
# fp32, with half the columns a thread, takes 47 by itself, and more when told that it may.
# An AMD SIMD holds 5 wavefronts of the bf16 kernel, 4 of the fp16 one, and 8 in fp32.
@triton.jit(do_not_specialize=["tokens", "prompts", "splits"])
def _gated_act_stats_kernel(
    gate,  # [T, F], rows gate_stride apart
    up,  # [T, F], rows up_stride apart, or None
    h,  # [T, F]
    spans,  # [P, 2]
    partials,  # [5, P·splits, F]: sum of abs h, of h², of h, maximum of abs h, open gates
    tokens,
    prompts,
    splits,
    width,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    program = tl.program_id(0)
    prompt = program // splits
    start = tl.load(spans + 2 * prompt).to(tl.int32)
    end = tl.load(spans + 2 * prompt + 1).to(tl.int32)

    # Every row has an owner: the padding behind a span goes with it, the first span takes what
    # lies before it too.
    first = tl.where(prompt == 0, 0, start)
    last = tl.load(spans + 2 * prompt + 2, mask=prompt + 1 < prompts, other=tokens).to(tl.int32)
    rows = tl.cdiv(last - first, splits)
    first += (program % splits) * rows
    last = tl.minimum(first + rows, last)

    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < width
    abs_sum = tl.zeros([BLOCK_F], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    square_sum = tl.zeros([BLOCK_F], tl.float32)
    max_abs = tl.zeros([BLOCK_F], h.dtype.element_ty)
    active = tl.zeros([BLOCK_F // 2], tl.uint32)

    for row in tl.range(first, last, num_stages=3):
        here = tl.cast(row, tl.int64)
        g = tl.load(gate + here * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value = activate(g, ACT)
        if up is not None:
            u = tl.load(up + here * up_stride + columns, mask=inside, other=0.0)
            value *= u.to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + here * width + columns, rounded, mask=inside)
        if (row >= start) & (row < end):
            value = rounded.to(tl.float32)
            abs_sum += tl.abs(value)
            total += value
            square_sum += value * value
            larger = tl.maximum(max_abs, tl.abs(rounded), propagate_nan=tl.PropagateNan.ALL)
            max_abs = larger.to(h.dtype.element_ty)  # before Triton 3.9, of bf16 it is fp32
            even, odd = tl.split(tl.reshape(g > 0, [BLOCK_F // 2, 2]))
            active += even.to(tl.uint32) + (odd.to(tl.uint32) << 16)

    counts = tl.reshape(tl.join(active & 0xFFFF, active >> 16), [BLOCK_F])
    plane = tl.num_programs(0).to(tl.int64) * width
    out = partials + program.to(tl.int64) * width + columns
    tl.store(out, abs_sum, mask=inside)
    tl.store(out + plane, square_sum, mask=inside)
    tl.store(out + 2 * plane, total, mask=inside)
    tl.store(out + 3 * plane, max_abs.to(tl.float32), mask=inside)
    tl.store(out + 4 * plane, counts.to(tl.float32), mask=inside)


def launch_options(element_size: int, *, hip: bool) -> dict[str, int | bool]:
    """Return the first pass's block and compile options, which make 16-byte loads of each row."""
    return {
        "BLOCK_F": _THREADS * 16 // element_size,
        "num_warps": 1 if hip else 2,  # wavefronts of 64 lanes, warps of 32
        "enable_fp_fusion": True,  # the default differs between Triton versions
        **({} if hip or element_size == 4 else {"maxnreg": _REGISTERS}),
    }


def split_count(tokens: int, prompts: int, column_blocks: int) -> int:
    """Return how many programs share a prompt's rows; it depends on the shape alone."""
    share = prompts * max(column_blocks, 1)
    wanted = max(triton.cdiv(_PROGRAMS, share), triton.cdiv(tokens, prompts * _MOST_ROWS))
    useful = triton.cdiv(tokens, prompts * _LEAST_ROWS)
    return max(min(wanted, useful), triton.cdiv(tokens, _COUNT_ROWS), 1)


def gated_act_stats_triton(
    gate: torch.Tensor, up: torch.Tensor | None, spans: torch.Tensor, act: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute h = act(gate)·up and its per-prompt and per-token sums.

    Args:
        gate: [T, F], bf16/fp16/fp32, unit stride along F.
        up: [T, F], as gate, or None.
        spans: [P, 2], int64, on the CPU: each prompt's rows, ascending and disjoint.
        act: an activation's code.

    Returns:
        h [T, F] in gate's dtype, prompt_stats [2, P, F] and token_stats [3, F] in fp32.

    Raises:
        ValueError: the dtype is not supported.

    Cost:
        3·T·F·b bytes (2·T·F·b without up), and 40·F for each program's part of the workspace.
    """
    if gate.dtype not in _DTYPES:
        raise ValueError(
            f"gated_act_stats: the Triton kernel takes bfloat16, float16 or float32, got "
            f"{gate.dtype}; convert gate and up, or use PRUNEKIT_BACKEND=reference"
        )
    tokens, width = gate.shape
    prompts = spans.shape[0]
    # Without prompts, one empty span still makes programs that write h.
    owners = spans.contiguous() if prompts else spans.new_zeros((1, 2))

    options = launch_options(gate.element_size(), hip=architecture(gate.device).startswith("gfx"))
    column_blocks = triton.cdiv(width, options["BLOCK_F"])
    splits = split_count(tokens, len(owners), column_blocks)
    programs = len(owners) * splits

    h = gate.new_empty((tokens, width))
    partials = gate.new_empty((5, programs, width), dtype=torch.float32)

    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(gate):
        launch(
            _gated_act_stats_kernel,
            (programs, column_blocks),
            gate,
            up,
            h,
            owners.to(gate.device, non_blocking=True),
            partials,
            tokens,
            len(owners),
            splits,
            width,
            gate.stride(0),
            0 if up is None else up.stride(0),
            ACT=act,
            **options,
        )
        of_prompt = torch.arange(
            0, (prompts + 1) * splits, splits, dtype=torch.int32, device=gate.device
        )
        return h, *reduce_segments(partials, of_prompt)
