"""What else is audited: other activations, sizes of no whole blocks, and prefill's candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.audit.cases import CASES, Case, Model, Problem
from prunekit.ops import activation_code
from prunekit_kernels.gated_mlp_prefill import CANDIDATES
from prunekit_kernels.tuning import Config, trying

_SIXTEEN_BITS = ("bf16", "fp16")
_NVIDIA = ("sm_80", "sm_90", "sm_100")
_BASES = {case.name: case for case in CASES}

_ACTIVATIONS = ("gelu", "relu2")
# The kernels that apply one, of the operations that take other activations most.
_ACTIVATING = {
    "gated_act_stats": "gated_act_stats",
    "gated_mlp_decode@1": "decode_hidden",
    "gated_mlp_decode@8": "decode_hidden",
}

_ODD = Model("odd", 1535, 8959)
_ODD_WIDTH = 6271
# By operation, its kernels that spill at odd sizes, on some architecture at least.
_ODD_OPERATIONS = {
    "gated_mlp_decode@1": ("decode_hidden",),
    "gated_mlp_decode@8": ("decode_hidden",),
    "gated_mlp_indexed@1": (),
    "gated_mlp_indexed@8": ("decode_hidden",),
}
_UNALIGNED = "at odd sizes rows begin at odd places"
_ELEMENTWISE = "at odd sizes every element has a load, an address and a mask of its own"


def _activated(base: Case, kernel: str, name: str) -> Case:
    act = activation_code(name)

    def problems(dtype: torch.dtype) -> Iterator[Problem]:
        return (replace(problem, act=act) for problem in base.problems(dtype))

    return replace(
        base,
        variant=name,
        problems=problems,
        only=frozenset({kernel}),
        narrow={},
        dtypes=_SIXTEEN_BITS,
    )


def _odd(base: Case, spilling: tuple[str, ...]) -> Case:
    def problems(dtype: torch.dtype) -> Iterator[Problem]:
        yield Problem(_ODD, _ODD_WIDTH, dtype)

    family = base.operation.removeprefix("gated_mlp_").replace("indexed", "decode")
    unaligned = dict.fromkeys((f"{family}_hidden", f"{family}_down"), _UNALIGNED)
    narrow = {**base.narrow, **unaligned}
    reasons = dict.fromkeys(spilling, _ELEMENTWISE)
    return replace(base, variant="odd", problems=problems, narrow=narrow, spilling=reasons)


def _name(config: Config) -> str:
    """Name a candidate by its tile and by how it runs, as in ``128x64-described-persistent``."""
    ways = {"DESCRIPTOR": "described", "PERSISTENT": "persistent"}
    how = [word for key, word in ways.items() if config.get(key)]
    return "-".join([f"{config['BLOCK_M']}x{config['BLOCK_N']}", *how])


def _candidate(base: Case, config: Config) -> Case:
    def run(problem: Problem, tokens: int) -> None:
        with trying("dual_product", config):
            base.run(problem, tokens)

    return replace(
        base,
        run=run,
        variant=_name(config),
        only=frozenset({"dual_product"}),
        # Hardware copies begin with sm_90, and three stages are for NVIDIA.
        architectures=("sm_90", "sm_100") if config.get("DESCRIPTOR") else _NVIDIA,
        dtypes=_SIXTEEN_BITS,
    )


VARIANTS = (
    *(_activated(_BASES[b], k, name) for b, k in _ACTIVATING.items() for name in _ACTIVATIONS),
    *(_odd(_BASES[name], spilling) for name, spilling in _ODD_OPERATIONS.items()),
    *(
        _candidate(_BASES["gated_mlp_prefill"], config)
        for config in CANDIDATES["dual_product"]
        if config.get("DESCRIPTOR") or config.get("PERSISTENT")
    ),
)
