"""Sums over each prompt's rows, gathered while a matrix product still holds its tiles.

A segment is what a prompt and a row of tiles share. The product's epilogue leaves the sums of each
segment in a workspace; a second, small kernel adds the segments in order. No atomics, so the same
input gives the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from prunekit_kernels.launch import launch

_REDUCE_ROWS = 32
_REDUCE_COLUMNS = 64


@dataclass(frozen=True)
class Segments:
    """Where prompts and rows of tiles meet: at most one segment for each of either.

    bounds: [S, 2], a segment's first row and the row behind its last, ascending.
    of_tile: [row_tiles + 1], the first segment of each row of tiles, and S.
    of_prompt: [P + 1], the first segment of each prompt, and S.
    All int32.
    """

    bounds: torch.Tensor
    of_tile: torch.Tensor
    of_prompt: torch.Tensor


def segments(spans: torch.Tensor, tokens: int, block_rows: int, device: torch.device) -> Segments:
    """Cut prompts where rows of tiles end.

    Args:
        spans: [P, 2], int64, on the CPU: each prompt's rows, ascending and disjoint.
        tokens: how many rows there are.
        block_rows: how many of them a tile has.
        device: where the result is needed.
    """
    starts, ends = spans[:, 0], spans[:, 1]
    touched = torch.where(ends > starts, (ends - 1) // block_rows - starts // block_rows + 1, 0)
    of_prompt = torch.cat([touched.new_zeros(1), touched.cumsum(0)])
    prompt = torch.arange(len(spans)).repeat_interleave(touched)
    tile = starts[prompt] // block_rows + torch.arange(len(prompt)) - of_prompt[prompt]
    low = torch.maximum(starts[prompt], tile * block_rows)
    high = torch.minimum(ends[prompt], (tile + 1) * block_rows)
    of_tile = torch.searchsorted(tile, torch.arange(triton.cdiv(tokens, block_rows) + 1))
    parts = torch.stack([low, high], 1), of_tile, of_prompt
    return Segments(*(t.to(torch.int32).to(device, non_blocking=True) for t in parts))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_segment_stats(
    h,  # [T, F], of which this program has just stored a tile, and all its threads have arrived
    active,  # [BLOCK_M, BLOCK_N], whether the gate is open
    row_tile,
    column_tile,
    width,
    bounds,
    of_tile,
    partials,  # [5, S, F]: sum of abs h, of h², of h, maximum of abs h, open gates
    segment_count,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Leave the sums of each segment of this row of tiles in the workspace.

    h is read back (from the L2 cache): as loaded, a thread has neighbouring columns and a column
    few threads, while accumulators are spread so that sums take four times as many shuffles. The
    open gates, which memory does not have, are counted for two columns at once.
    """
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    local = tl.arange(0, BLOCK_M)
    tile = h + tl.cast(row_tile, tl.int64) * BLOCK_M * width
    places = tile + (local[:, None] * width + columns[None, :])
    even, odd = tl.split(tl.reshape(active, [BLOCK_M, BLOCK_N // 2, 2]))
    pairs = even.to(tl.int32) + (odd.to(tl.int32) << 16)

    plane = tl.cast(segment_count, tl.int64) * width
    for segment in range(tl.load(of_tile + row_tile), tl.load(of_tile + row_tile + 1)):
        low = tl.load(bounds + 2 * segment) - row_tile * BLOCK_M
        high = tl.load(bounds + 2 * segment + 1) - row_tile * BLOCK_M
        counted = ((local >= low) & (local < high))[:, None]
        value = tl.load(places, mask=counted & inside[None, :], other=0.0).to(tl.float32)
        count = tl.sum(tl.where(counted, pairs, 0), 0)
        counts = tl.reshape(tl.join(count & 0xFFFF, count >> 16), [BLOCK_N])
        out = partials + tl.cast(segment, tl.int64) * width + columns
        tl.store(out, tl.sum(tl.abs(value), 0), mask=inside)
        tl.store(out + plane, tl.sum(value * value, 0), mask=inside)
        tl.store(out + 2 * plane, tl.sum(value, 0), mask=inside)
        tl.store(out + 3 * plane, tl.reduce(tl.abs(value), 0, _larger), mask=inside)
        tl.store(out + 4 * plane, counts.to(tl.float32), mask=inside)


# One program for each row of the two results and some columns of it, so that long sums do not wait
# for one another.
@triton.jit(do_not_specialize=["prompts", "segment_count"])
def _reduce_segments_kernel(
    partials,  # [5, S, F]
    of_prompt,  # [P + 1]
    prompt_stats,  # [2, P, F]
    token_stats,  # [3, F]
    prompts,
    segment_count,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    result = tl.program_id(0).to(tl.int64)
    statistic = result - 2 * prompts  # negative: a prompt's sum; otherwise a row of token_stats
    is_prompt = statistic < 0
    plane = tl.where(is_prompt, (result >= prompts).to(tl.int64), statistic + 2)
    prompt = tl.where(result < prompts, result, result - prompts)
    first = tl.load(of_prompt + prompt, mask=is_prompt, other=0)
    last = tl.load(of_prompt + prompt + 1, mask=is_prompt, other=segment_count)
    is_max = plane == 3

    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < width
    reduced = tl.zeros([BLOCK_F], tl.float32)
    for low in range(first, last, BLOCK_S):
        rows = low + tl.arange(0, BLOCK_S)
        places = partials + (plane * segment_count + rows)[:, None] * width + columns[None, :]
        block = tl.load(places, mask=(rows < last)[:, None] & inside[None, :], other=0.0)
        if is_max:
            reduced = _larger(reduced, tl.reduce(block, 0, _larger))
        else:
            reduced += tl.sum(block, 0)

    if is_prompt:
        tl.store(prompt_stats + result * width + columns, reduced, mask=inside)
    else:
        tl.store(token_stats + statistic * width + columns, reduced, mask=inside)


def reduce_segments(
    partials: torch.Tensor, of_prompt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add segments in order: over each prompt, and over all.

    Args:
        partials: [5, S, F], fp32, as `store_segment_stats` leaves them.
        of_prompt: [P + 1], int32, as in `Segments`.

    Returns:
        prompt_stats [2, P, F] and token_stats [3, F] in fp32, as gated_act_stats defines them.

    Cost:
        20·S·F bytes.
    """
    _, segment_count, width = partials.shape
    prompts = len(of_prompt) - 1
    prompt_stats = partials.new_empty((2, prompts, width))
    token_stats = partials.new_empty((3, width))
    launch(
        _reduce_segments_kernel,
        (2 * prompts + 3, triton.cdiv(width, _REDUCE_COLUMNS)),
        partials,
        of_prompt,
        prompt_stats,
        token_stats,
        prompts,
        segment_count,
        width,
        BLOCK_S=_REDUCE_ROWS,
        BLOCK_F=_REDUCE_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return prompt_stats, token_stats
