"""What is checked and timed: each operation, its plain torch form, and what a run costs at least.

One registry. An operation that prunekit.ops does not have is an error when its turn comes, not
something to pass over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.gpu.shapes import Shape
from prunekit import ops

ALL = (torch.bfloat16, torch.float16, torch.float32)
_PROMPTS = 8
_LEAST_PROMPT = 8  # tokens
# What an fp32 sum of some thousand terms loses in order; torch's, split and added, loses less.
_IN_ORDER = 32 * torch.finfo(torch.float32).eps

Inputs = dict[str, torch.Tensor]
Function = Callable[..., Any]


class MissingError(RuntimeError):
    """prunekit.ops lacks an operation, or nothing but its reference serves this device."""


def operation(name: str) -> Function:
    """Return a public operation by its name."""
    if not hasattr(ops, name):
        raise MissingError(f"prunekit.ops has no {name}; add it, or take its workload out")
    return getattr(ops, name)


def call(function: Function, inputs: Inputs) -> Any:
    """Call a function of the inputs, in their order."""
    return function(*inputs.values())


def differentiate(function: Function, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Call a function of all inputs but the last, and take the gradients that the last one asks."""
    *tensors, dy = inputs.values()
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, dy)


@dataclass(frozen=True)
class Workload:
    """One thing to run, in ways that are compared.

    Every function in it takes the tensors that ``make`` returns, in that order.

    Attributes:
        name: of the workload; ``op``: of the operation in prunekit.ops.
        make: (shape, dtype, generator) -> inputs, on the generator's device.
        ours: the operation; plain: the same in plain torch, right in any dtype.
        outputs: their names, as `results` returns them.
        tokens: those of the speed table. moved, flops: (shape, bytes an element) -> the least.
        run: how a function is called on inputs.
        results: (inputs after the run, what it returned) -> tensors to compare.
        rivals: further functions to time, by name.
        layered: time a stack of layers in one graph, as decoding runs them.
        pruned_only: the dense width is nothing to time.
        kernel: the operation whose backend counts, where it is not ``op`` itself.
        slack: (tokens, dtype) -> error allowed beside twice torch's, of the largest value.
    """

    name: str
    op: str
    make: Callable[[Shape, torch.dtype, torch.Generator], Inputs]
    ours: Function
    plain: Function
    outputs: tuple[str, ...]
    tokens: tuple[int, ...]
    moved: Callable[[Shape, int], int]
    flops: Callable[[Shape], int]
    run: Callable[[Function, Inputs], Any] = call
    results: Callable[[Inputs, Any], tuple[torch.Tensor, ...]] = lambda inputs, out: (
        out if isinstance(out, tuple) else (out,)
    )
    rivals: dict[str, Function] = field(default_factory=dict)
    layered: bool = False
    pruned_only: bool = False
    compiled: bool = True
    slack: Callable[[int, torch.dtype], float] = lambda tokens, dtype: max(
        torch.finfo(dtype).eps, _IN_ORDER
    )
    kernel: str = ""


def _normal(generator: torch.Generator, dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(size, dtype=dtype, device=generator.device, generator=generator)


def _matrix(generator: torch.Generator, dtype: torch.dtype, rows: int, columns: int):
    return _normal(generator, dtype, rows, columns).mul_(columns**-0.5)


def _mlp(width: Callable[[Shape], int]):
    def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        hidden, neurons = shape.hidden, width(shape)
        return {
            "x": _normal(generator, dtype, shape.tokens, hidden),
            "gate": _matrix(generator, dtype, neurons, hidden),
            "up": _matrix(generator, dtype, neurons, hidden),
            "down": _matrix(generator, dtype, hidden, neurons),
        }

    return make


_compact, _dense = _mlp(lambda shape: shape.width), _mlp(lambda shape: shape.dense)


def _kept(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(shape.dense, device=generator.device, generator=generator)
    return order[: shape.width].sort().values


def _indexed(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {**_dense(shape, dtype, generator), "index": _kept(shape, generator)}


def _layer(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _indexed(shape, dtype, generator)
    del inputs["x"]
    return inputs


def _with_gradient(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _compact(shape, dtype, generator)
    return {**inputs, "dy": _normal(generator, dtype, shape.tokens, shape.hidden)}


def _prompts(tokens: int) -> int:
    return max(1, min(_PROMPTS, tokens // _LEAST_PROMPT))


def _stats_bytes(shape: Shape) -> int:
    return 4 * (_prompts(shape.tokens) + 4) * shape.width


def _prompt_rows(tokens: int) -> list[tuple[int, int]]:
    prompts = _prompts(tokens)
    return [(tokens * p // prompts, tokens * (p + 1) // prompts) for p in range(prompts)]


@cache
def _spans(tokens: int) -> torch.Tensor:
    return torch.tensor(_prompt_rows(tokens), dtype=torch.int64)


def _activations(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    size = shape.tokens, shape.width
    return {"gate": _normal(generator, dtype, *size), "up": _normal(generator, dtype, *size)}


def _gram(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "gram": torch.zeros(shape.width, shape.width, dtype=wide, device=generator.device),
        "h": _normal(generator, dtype, shape.tokens, shape.width),
    }


def _rows(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x = _normal(generator, dtype, shape.dense, shape.hidden)
    return {"x": x, "index": _kept(shape, generator)}


def _columns(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x = _normal(generator, dtype, shape.hidden, shape.dense)
    return {"x": x, "index": _kept(shape, generator)}


def plain_mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _checkpointed(*tensors):
    """As torch does what prunekit's backward does: nothing of width F is kept in between."""
    return checkpoint(plain_mlp, *tensors, use_reentrant=False)


def plain_indexed(x, gate, up, down, index):
    return plain_mlp(x, gate[index], up[index], down[:, index])


def plain_act_stats(gate, up):
    """As the reference does, without its loop over the prompts' rows."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    h = (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
    value = h.to(wide)
    size = value.abs()
    square = value.square()
    abs_sums, square_sums = (
        torch.stack([x[a:b].sum(0) for a, b in _prompt_rows(len(h))]) for x in (size, square)
    )
    open_gates = (gate > 0).sum(0)
    return h, abs_sums, square_sums, value.sum(0), size.amax(0), open_gates


def plain_stats(x, gate, up, down):
    h, *stats = plain_act_stats(F.linear(x, gate), F.linear(x, up))
    return F.linear(h, down), h, *stats


def _split(*outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *front, prompt_stats, token_stats = outputs
    return (*front, *prompt_stats.unbind(), *token_stats.unbind())


def plain_gram(gram, h):
    wide = h.to(gram.dtype)
    gram.addmm_(wide.T, wide)


def _gram_in_dtype(gram, h):
    """torch's best: the matrix units take h as it is, and sum in fp32."""
    torch.addmm(gram, h.T, h, out_dtype=gram.dtype, out=gram)


def _triangle(inputs: Inputs, _: Any) -> tuple[torch.Tensor, ...]:
    return (inputs["gram"].triu(),)


def _mlp_bytes(shape: Shape, b: int) -> int:
    return b * (2 * shape.tokens * shape.hidden + 3 * shape.hidden * shape.width)


def _mlp_flops(shape: Shape) -> int:
    return 6 * shape.tokens * shape.hidden * shape.width


_STATS = ("h", "prompt_abs", "prompt_squares", "token_sum", "token_max_abs", "token_active")

_MLP = {
    "op": "gated_mlp",
    "make": _compact,
    "ours": lambda *tensors: operation("gated_mlp")(*tensors, act="silu"),
    "plain": plain_mlp,
    "outputs": ("y",),
    "moved": _mlp_bytes,
    "flops": _mlp_flops,
}
_GATHER = {
    "outputs": ("picked",),
    "tokens": (1,),
    "flops": lambda shape: 0,
    "pruned_only": True,
    "compiled": False,
    "slack": lambda tokens, dtype: 0.0,
}

# In the order of their worth, should time run out.
WORKLOADS = (
    Workload(name="decode", tokens=(1, 16, 4, 8), layered=True, **_MLP),
    Workload(name="prefill", tokens=(4096, 512), **_MLP),
    Workload(
        name="prefill with statistics",
        op="gated_mlp_stats",
        make=_compact,
        ours=lambda x, *weights: _split(
            *operation("gated_mlp_stats")(x, *weights, _spans(len(x)), act="silu")
        ),
        plain=plain_stats,
        outputs=("y", *_STATS),
        tokens=(4096,),
        moved=lambda s, b: _mlp_bytes(s, b) + b * s.tokens * s.width + _stats_bytes(s),
        flops=_mlp_flops,
    ),
    Workload(
        name="activation with statistics",
        op="gated_act_stats",
        make=_activations,
        ours=lambda gate, up: _split(
            *operation("gated_act_stats")(gate, up, _spans(len(gate)), "silu")
        ),
        plain=plain_act_stats,
        outputs=_STATS,
        tokens=(4096,),
        moved=lambda s, b: 3 * b * s.tokens * s.width + _stats_bytes(s),
        flops=lambda shape: 0,
        rivals={"torch, h alone": lambda gate, up: F.silu(gate) * up},
    ),
    Workload(
        name="forward and backward",
        tokens=(2048,),
        run=differentiate,
        **_MLP
        | {
            "make": _with_gradient,
            "kernel": "gated_mlp_backward",
            "outputs": ("dx", "dgate", "dup", "ddown"),
            "rivals": {"torch, recomputing": _checkpointed},
            "moved": lambda s, b: b * (4 * s.tokens * s.hidden + 6 * s.hidden * s.width),
            "flops": lambda s: 18 * s.tokens * s.hidden * s.width,
        },
    ),
    Workload(
        name="indexed",
        op="gated_mlp_indexed",
        make=_indexed,
        ours=lambda *tensors: operation("gated_mlp_indexed")(*tensors, act="silu"),
        plain=plain_indexed,
        outputs=("y",),
        tokens=(1, 512),
        # Of down's columns nearly every sector is read.
        moved=lambda s, b: b * (2 * s.tokens + 2 * s.width + s.dense) * s.hidden,
        flops=_mlp_flops,
    ),
    Workload(
        name="gram",
        op="gram_update",
        make=_gram,
        ours=lambda gram, h: operation("gram_update")(gram, h),
        plain=plain_gram,
        outputs=("gram",),
        tokens=(4096,),
        moved=lambda s, b: b * s.tokens * s.width + 4 * s.width * (s.width + 1),
        flops=lambda s: s.tokens * s.width * (s.width + 1),
        results=_triangle,
        rivals={"torch, fp32 sums": _gram_in_dtype},
        # Matrix units cut off what they add, once every 16 tokens.
        slack=lambda tokens, dtype: max(16, tokens / 16) * torch.finfo(torch.float32).eps,
    ),
    Workload(
        name="rows",
        op="gather_rows",
        make=_rows,
        ours=lambda x, index: operation("gather_rows")(x, index),
        plain=lambda x, index: x.index_select(0, index),
        rivals={"x[index]": lambda x, index: x[index]},
        moved=lambda s, b: 2 * b * s.width * s.hidden,
        **_GATHER,
    ),
    Workload(
        name="columns",
        op="gather_cols",
        make=_columns,
        ours=lambda x, index: operation("gather_cols")(x, index),
        plain=lambda x, index: x.index_select(1, index),
        rivals={"x[:, index]": lambda x, index: x[:, index]},
        moved=lambda s, b: b * s.hidden * (s.dense + s.width),
        **_GATHER,
    ),
    Workload(
        name="layer",
        op="compact_mlp",
        make=_layer,
        ours=lambda *tensors: operation("compact_mlp")(*tensors),
        plain=lambda gate, up, down, index: (
            gate.index_select(0, index),
            up.index_select(0, index),
            down.index_select(1, index),
        ),
        moved=lambda s, b: b * s.hidden * (s.dense + 5 * s.width),
        kernel="compact_mlp_out",
        **_GATHER | {"outputs": ("gate", "up", "down")},
    ),
)
