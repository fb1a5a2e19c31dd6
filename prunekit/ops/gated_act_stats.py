"""The MLP's activation and its per-neuron statistics, in one pass over gate and up."""

from __future__ import annotations

import torch

from prunekit.ops.activations import activate, activation_code
from prunekit.ops.registry import call, define

# Rows of the prompts' statistics [2, P, F] and of the tokens' [3, F].
PROMPT_ABS_SUM, PROMPT_SQUARE_SUM = range(2)
TOKEN_SUM, TOKEN_MAX_ABS, TOKEN_ACTIVE = range(3)

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gated_act_stats_ref(
    gate: torch.Tensor, up: torch.Tensor | None, spans: torch.Tensor, act: int
) -> Outputs:
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    activation = activate(gate.to(wide), act)
    h = (activation if up is None else activation * up.to(wide)).to(gate.dtype)

    prompts = [h[start:end].to(wide) for start, end in spans.tolist()]
    gates = [gate[start:end] for start, end in spans.tolist()]
    prompt_stats = h.new_zeros((2, len(prompts), h.shape[1]), dtype=torch.float32)
    for p, rows in enumerate(prompts):
        prompt_stats[PROMPT_ABS_SUM, p] = rows.abs().sum(0)
        prompt_stats[PROMPT_SQUARE_SUM, p] = rows.square().sum(0)

    token_stats = h.new_zeros((3, h.shape[1]), dtype=torch.float32)
    counted = torch.cat(prompts) if prompts else h[:0].to(wide)
    if counted.shape[0]:
        token_stats[TOKEN_SUM] = counted.sum(0)
        token_stats[TOKEN_MAX_ABS] = counted.abs().amax(0)
        token_stats[TOKEN_ACTIVE] = (torch.cat(gates) > 0).sum(0)
    return h, prompt_stats, token_stats


def _gated_act_stats_fake(
    gate: torch.Tensor, up: torch.Tensor | None, spans: torch.Tensor, act: int
) -> Outputs:
    tokens, width = gate.shape
    return (
        gate.new_empty((tokens, width)),
        gate.new_empty((2, spans.shape[0], width), dtype=torch.float32),
        gate.new_empty((3, width), dtype=torch.float32),
    )


define(
    "gated_act_stats(Tensor gate, Tensor? up, Tensor spans, int act) -> (Tensor, Tensor, Tensor)",
    reference=gated_act_stats_ref,
    fake=_gated_act_stats_fake,
)


def check_spans(name: str, spans: torch.Tensor, tokens: int) -> None:
    """Raise ValueError unless spans are [P, 2] int64 on the CPU, ascending within the tokens."""
    if spans.dim() != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64 or spans.is_cuda:
        raise ValueError(
            f"{name}: spans must be [P, 2] int64 on the CPU, got {tuple(spans.shape)} "
            f"{spans.dtype} on {spans.device}"
        )
    ends = spans.flatten().tolist()
    if ends and (ends[0] < 0 or ends[-1] > tokens or sorted(ends) != ends):
        raise ValueError(
            f"{name}: spans must ascend without overlap within [0, {tokens}], got "
            f"{spans.tolist()[:8]}"
        )


def gated_act_stats(
    gate: torch.Tensor, up: torch.Tensor | None, spans: torch.Tensor, act: str
) -> Outputs:
    """Compute h = act(gate)·up, and the sums over each prompt's tokens that scoring needs.

    The statistics are taken of h as rounded to its dtype, which is what enters the down projection.
    Rows outside every span (padding) get their h and count in no statistic.

    Args:
        gate: [T, F], bf16/fp16/fp32/fp64, the pre-activation; unit stride along F.
        up: [T, F], as gate, or None for a plain MLP (h = act(gate)).
        spans: [P, 2], int64, on the CPU: prompt p is the rows spans[p, 0] to spans[p, 1], the end
            excluded; ascending and disjoint; empty spans allowed.
        act: silu, gelu, gelu_tanh, relu or relu2.

    Returns:
        h: [T, F], gate's dtype, contiguous.
        prompt_stats: [2, P, F], fp32, over each prompt's tokens: sum of abs h, sum of h².
        token_stats: [3, F], fp32, over the tokens of all prompts: sum of h, maximum of abs h, and
            the number of tokens whose gate is open (gate > 0).

    Raises:
        ValueError: shapes, dtypes or strides are not as above, or spans overlap or run out of T.

    Cost:
        3·T·F·b bytes (2·T·F·b without up) plus 4·(2·P + 3)·F.
    """
    if gate.dim() != 2 or gate.stride(-1) != 1:
        raise ValueError(
            f"gated_act_stats: gate must be [T, F] with unit stride along F, got shape "
            f"{tuple(gate.shape)} and strides {gate.stride()}; call .contiguous()"
        )
    if up is not None and (
        up.shape != gate.shape
        or up.dtype != gate.dtype
        or up.device != gate.device
        or up.stride(-1) != 1
    ):
        raise ValueError(
            f"gated_act_stats: up must match gate ({tuple(gate.shape)}, {gate.dtype}, "
            f"{gate.device}, unit stride along F), got {tuple(up.shape)}, {up.dtype}, {up.device}"
        )
    check_spans("gated_act_stats", spans, gate.shape[0])
    return call("gated_act_stats", gate, up, spans, activation_code(act))
