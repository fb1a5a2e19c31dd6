"""Whether an operation is right: against fp64, and measured by torch's own error in its dtype."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.gpu.results import WrongError
from bench.gpu.shapes import Shape
from bench.gpu.timer import Timer
from bench.gpu.workloads import (
    WORKLOADS,
    Function,
    Inputs,
    MissingError,
    Workload,
    operation,
    plain_mlp,
)
from prunekit.ops import backends, forced_backend
from prunekit.ops.registry import OPERATIONS

_COUNTS = 2.0  # gates so near 0 that fp32 and fp64 disagree on their sign


def inputs_of(workload: Workload, shape: Shape, dtype: torch.dtype, device, seed=0) -> Inputs:
    """Return a workload's inputs, the same for the same arguments."""
    return workload.make(shape, dtype, torch.Generator(device).manual_seed(seed))


def served_by(workload: Workload, device: torch.device) -> str:
    """Return the backend of a workload's operation; on a GPU the reference is not one.

    Raises:
        MissingError: there is no such operation, or no kernel of it for this GPU.
    """
    operation(workload.op)
    kernel = workload.kernel or workload.op
    if kernel not in OPERATIONS:
        raise MissingError(f"prunekit has no operation {kernel}; add it, or take its workload out")
    backend = forced_backend() or backends.serving(kernel)
    if device.type == "cuda" and backend == "reference":
        why = OPERATIONS[kernel].unavailable or "there is none"
        raise MissingError(f"{kernel}: no kernel serves this GPU: {why}")
    return backend


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what new_empty returns with NaN, so that an element nobody writes shows."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Warnings are of cuBLAS, whose products give the same bits as long as they use one stream.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def outputs(workload: Workload, function: Function, inputs: Inputs) -> list[torch.Tensor]:
    """Return the tensors to compare, of a run that leaves the inputs as they are."""
    inputs = {name: tensor.clone() for name, tensor in inputs.items()}  # one may be written to
    with poisoned():
        return [t.detach() for t in workload.results(inputs, workload.run(function, inputs))]


def exact(workload: Workload, inputs: Inputs) -> list[torch.Tensor]:
    """Return a workload's outputs computed in fp64."""
    wide = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    return outputs(workload, workload.plain, wide)


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return (got.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0


def compare(
    workload: Workload, tokens: int, dtype: torch.dtype, ours, theirs, wanted
) -> dict[str, dict[str, float]]:
    """Hold every output's largest error against torch's.

    Returns:
        For each output its error, torch's, and what was allowed: twice torch's, and the workload's
        slack of the largest value (a sum over tokens rounds its terms, not itself).

    Raises:
        WrongError: one is above, NaN, or of another shape.
    """
    found, wrong = {}, []
    for name, a, b, c in zip(workload.outputs, ours, theirs, wanted, strict=True):
        if a.shape != c.shape:
            raise WrongError(f"{name}: has shape {tuple(a.shape)}, expected {tuple(c.shape)}")
        slack = workload.slack(tokens, dtype)
        if name in ("prompt_abs", "prompt_squares", "token_sum"):
            slack = max(slack / max(tokens, 1) ** 0.5, 1e-5)
        largest = c.double().abs().max().item() if c.numel() else 0.0
        allowed = _COUNTS if name == "token_active" else slack * largest
        error, torch_error = _error(a, c), _error(b, c)
        allowed += 2 * torch_error
        found[name] = {"error": error, "torch_error": torch_error, "allowed": allowed}
        if not error <= allowed:
            wrong.append(f"{name}: error {error:.3g}, torch {torch_error:.3g} of {largest:.3g}")
    if wrong:
        raise WrongError("; ".join(wrong))
    return found


def check(workload: Workload, shape: Shape, dtype: torch.dtype, device) -> dict[str, Any]:
    """Compare an operation with fp64 and with torch, and two of its runs bit by bit.

    Raises:
        MissingError, WrongError: as above, or the two runs differ.
    """
    backend = served_by(workload, device)
    inputs = inputs_of(workload, shape, dtype, device)
    ours = outputs(workload, workload.ours, inputs)
    again = outputs(workload, workload.ours, inputs)
    theirs = outputs(workload, workload.plain, inputs)
    errors = compare(workload, shape.tokens, dtype, ours, theirs, exact(workload, inputs))
    for name, a, b in zip(workload.outputs, ours, again, strict=True):
        if not torch.equal(a, b):
            raise WrongError(f"{name}: two runs on the same input differ")
    return {"backend": backend, "errors": errors}


def check_graph(workload: Workload, shape: Shape, dtype, device, timer: Timer) -> dict[str, Any]:
    """Capture an operation, replay it over new input, and compare with a run on that input."""
    backend = served_by(workload, device)
    inputs = inputs_of(workload, shape, dtype, device)
    replay, output = timer.capture(lambda: workload.run(workload.ours, inputs))
    for seed in (1, 2):
        inputs["x"].copy_(inputs_of(workload, shape, dtype, device, seed)["x"])
        replay()
        if not torch.equal(output, workload.run(workload.ours, inputs)):
            raise WrongError(f"replay {seed} differs from a run on the same input")
    return {"backend": backend}


def check_module(shape: Shape, dtype: torch.dtype, device, compiler: str) -> dict[str, Any]:
    """Compile a CompactMLP whole, and compare it with its formula."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prunekit.arch import find_mlps
    from prunekit.nn import CompactMLP

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
        vocab_size=8,
    )
    view = find_mlps(LlamaForCausalLM(config).to(device, dtype).requires_grad_(False))[0]
    weights = view.gate, view.up, view.down
    x = torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=device)
    module = torch.compile(CompactMLP(view), backend=compiler, fullgraph=True)
    wanted = plain_mlp(x.double(), *(w.double() for w in weights))
    one = WORKLOADS[0]
    return {
        "errors": compare(one, shape.tokens, dtype, [module(x)], [plain_mlp(x, *weights)], [wanted])
    }
