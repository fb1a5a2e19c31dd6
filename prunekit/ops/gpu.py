"""What the dispatcher calls on a GPU: Triton where its kernels fit, the references elsewhere.

A backend that is forced is not replaced: what the kernels cannot take is then an error.
"""

from __future__ import annotations

import torch

from prunekit.ops.gated_act_stats import gated_act_stats_ref
from prunekit.ops.gated_mlp import gated_mlp_ref
from prunekit.ops.gated_mlp_backward import gated_mlp_backward_ref
from prunekit.ops.gated_mlp_indexed import gated_mlp_indexed_ref
from prunekit.ops.gated_mlp_stats import gated_mlp_stats_composed, gated_mlp_stats_ref
from prunekit.ops.gather import compact_mlp
from prunekit.ops.gram import gram_update_tiled
from prunekit.ops.registry import BackendError, force_backend, forced_backend
from prunekit_kernels.gated_act_stats import gated_act_stats_triton
from prunekit_kernels.gated_mlp import (
    DTYPES,
    backward_path,
    gated_mlp_triton,
    path,
    stats_path,
)
from prunekit_kernels.gated_mlp_backward import gated_mlp_backward as gated_mlp_backward_triton
from prunekit_kernels.gated_mlp_decode import MOST_TOKENS, gated_mlp_decode
from prunekit_kernels.gated_mlp_prefill import gated_mlp_prefill_stats
from prunekit_kernels.gram_update import gram_update_triton


def _problem(*tensors: torch.Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None if they can."""
    present = [t for t in tensors if t is not None]
    dtypes = {t.dtype for t in present}
    if dtypes - set(DTYPES) or len(dtypes) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"expected one dtype of bfloat16, float16, float32; got {names}"
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in present):
        return "expected unit stride along the last axis; call .contiguous()"
    return None


def _taken(name: str, *tensors: torch.Tensor | None) -> bool:
    """Whether the kernels take them; raises BackendError if not and Triton is forced."""
    problem = _problem(*tensors)
    if problem is not None and forced_backend() == "triton":
        raise BackendError(f"{name}: backend triton cannot serve it: {problem}")
    return problem is None


def gated_act_stats(gate, up, spans, act):
    taken = _taken("gated_act_stats", gate, up)
    return (gated_act_stats_triton if taken else gated_act_stats_ref)(gate, up, spans, act)


def gated_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, act):
    tensors = gate, up, down, gate_bias, up_bias, down_bias
    rows = x.reshape(-1, x.shape[-1])
    if not _taken("gated_mlp", rows, *tensors) or (
        forced_backend() is None and path(rows, gate) == "torch"
    ):
        return gated_mlp_ref(x, *tensors, act)
    return gated_mlp_triton(rows, *tensors, act).view(*x.shape[:-1], down.shape[0])


def gated_mlp_stats(x, gate, up, down, gate_bias, up_bias, down_bias, spans, act):
    tensors = x, gate, up, down, gate_bias, up_bias, down_bias
    if not _taken("gated_mlp_stats", *tensors):
        return gated_mlp_stats_ref(*tensors, spans, act)
    if forced_backend() is None and stats_path(x, gate) == "torch":
        return gated_mlp_stats_composed(*tensors, spans, act)
    return gated_mlp_prefill_stats(*tensors, spans, act)


def gated_mlp_indexed(x, gate, up, down, index, gate_bias, up_bias, down_bias, act):
    """Through the index where few tokens read each weight once; for more, a compact copy pays."""
    rows = x.reshape(-1, x.shape[-1])
    biases = gate_bias, up_bias, down_bias
    if not _taken("gated_mlp_indexed", rows, gate, up, down, *biases):
        return gated_mlp_indexed_ref(x, gate, up, down, index, *biases, act)
    if len(rows) <= MOST_TOKENS:
        y = gated_mlp_decode(rows, gate, up, down, *biases, act, index.contiguous())
        return y.view(*x.shape[:-1], down.shape[0])
    kept = [None if b is None else b.index_select(0, index) for b in (gate_bias, up_bias)]
    with force_backend(None):  # no Triton kernel gathers
        weights = compact_mlp(gate, up, down, index)
    return gated_mlp(x, *weights, *kept, down_bias, act)


def gated_mlp_backward(grad, x, gate, up, down, gate_bias, up_bias, act, needed):
    dy, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    tensors = gate, up, down, gate_bias, up_bias
    if dy.stride(-1) != 1:  # a broadcast gradient, as of sum()
        dy = dy.contiguous()
    if not _taken("gated_mlp_backward", dy, rows, *tensors) or (
        forced_backend() is None and backward_path(rows, gate) == "torch"
    ):
        return gated_mlp_backward_ref(grad, x, *tensors, act, needed)
    found = gated_mlp_backward_triton(dy, rows, *tensors, act, tuple(needed))
    if found[0] is not None:
        found = (found[0].view(x.shape), *found[1:])
    return [gradient for gradient, wanted in zip(found, needed, strict=True) if wanted]


def gram_update(gram, h):
    """Triton into fp32; otherwise torch's products, block by block of the triangle."""
    if gram.dtype == torch.float32 and _taken("gram_update", h):
        return gram_update_triton(gram, h)
    if forced_backend() == "triton":
        raise BackendError(
            f"gram_update: backend triton cannot serve it: expected an fp32 gram, got {gram.dtype}"
        )
    return gram_update_tiled(gram, h)
