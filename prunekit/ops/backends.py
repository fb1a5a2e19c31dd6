"""Attaches the C++ extension and the Triton kernels to the operations, where they can be had."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from prunekit.ops.gated_mlp_cpu import gated_mlp_cpu
from prunekit.ops.gated_mlp_stats import gated_mlp_stats_composed
from prunekit.ops.registry import LIBRARY, OPERATIONS, unless_forced

_GATHERS = ("gather_rows", "gather_cols", "gather_rows_out", "gather_cols_out")
_GATHERS += ("compact_rows_", "compact_cols_", "compact_mlp_out")
_CPP_OPERATIONS = (*_GATHERS, "gated_act_stats")
# Python around the extension's own operators and torch's products.
_AROUND_CPP = {"gated_mlp": gated_mlp_cpu, "gated_mlp_stats": gated_mlp_stats_composed}
_TRITON_OPERATIONS = (
    "gated_act_stats",
    "gated_mlp",
    "gated_mlp_backward",
    "gated_mlp_indexed",
    "gated_mlp_stats",
    "gram_update",
)


def _load_extension() -> str | None:
    """Load the compiled extension; return why it could not be, or None if it was."""
    spec = importlib.util.find_spec("prunekit")
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    found = sorted(path for place in places for path in place.glob("_C*.so"))
    if not found:
        return (
            "the C++ extension is not built; with torch and a C++17 compiler installed, run "
            "`pip install --no-build-isolation .` in the source tree"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__}: {error}"
    return None


def _attach_extension(why_not: str | None) -> None:
    for name in _CPP_OPERATIONS:
        if why_not is None:
            overload = getattr(torch.ops.prunekit, name).default
            OPERATIONS[name].backends["cpp"] = overload
        else:
            OPERATIONS[name].unavailable["cpp"] = why_not
    for name, kernel in _AROUND_CPP.items():
        if why_not is None:
            OPERATIONS[name].backends["cpp"] = kernel
            LIBRARY.impl(name, unless_forced(name, kernel), "CPU")
        else:
            OPERATIONS[name].unavailable["cpp"] = why_not


def _attach_cuda(why_not: str | None) -> None:
    """Name the CUDA gathers, which the extension registers where it was built with them."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in _GATHERS:
        if why_not is None and has_kernel(f"prunekit::{name}", "CUDA"):
            OPERATIONS[name].backends["cuda"] = getattr(torch.ops.prunekit, name).default
        else:
            OPERATIONS[name].unavailable["cuda"] = why_not or (
                "the C++ extension was built without CUDA; with nvcc and a CUDA build of torch, "
                "run `pip install --no-build-isolation .` in the source tree"
            )


def _triton_problem() -> str | None:
    """Why Triton kernels cannot run here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def _attach_triton(why_not: str | None) -> None:
    if why_not is not None:
        for name in _TRITON_OPERATIONS:
            OPERATIONS[name].unavailable["triton"] = why_not
        return
    from prunekit.ops import gpu

    for name in _TRITON_OPERATIONS:
        kernel = getattr(gpu, name)
        OPERATIONS[name].backends["triton"] = kernel
        LIBRARY.impl(name, unless_forced(name, kernel), "CUDA")


def serving(name: str) -> str:
    """The backend that serves an operation on this machine's GPU, or on its CPU without one."""
    fast = ("cuda", "triton") if torch.cuda.is_available() else ("cpp",)
    return next((b for b in fast if b in OPERATIONS[name].backends), "reference")


EXTENSION_PROBLEM = _load_extension()
TRITON_PROBLEM = _triton_problem()
_attach_extension(EXTENSION_PROBLEM)
_attach_cuda(EXTENSION_PROBLEM)
_attach_triton(TRITON_PROBLEM)
