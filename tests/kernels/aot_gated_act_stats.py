"""Compiles gated_act_stats, and the same kernel without sums, and prints figures as JSON lines.

A process of its own, because one that interprets Triton kernels cannot compile them:
``python -m tests.kernels.aot_gated_act_stats TARGETS DTYPES ACTIVATIONS``, each a list with commas.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

import torch
import triton
import triton.language as tl

from bench.audit.compile import compile_all
from bench.audit.specialise import Specialisation, specialise
from prunekit_kernels.activations import activate
from prunekit_kernels.gated_act_stats import gated_act_stats_triton, launch_options
from prunekit_kernels.launch import launch, recorded

TOKENS, WIDTH = 2048, 8960


@triton.jit(do_not_specialize=["first", "last"])
def _plain_kernel(
    gate,
    up,
    h,
    first,
    last,
    width,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """h = act(gate)·up alone: the same loads in the same blocks, and no statistics."""
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < width
    for row in tl.range(first, last, num_stages=3):
        here = tl.cast(row, tl.int64)
        g = tl.load(gate + here * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value = activate(g, ACT)
        if up is not None:
            u = tl.load(up + here * up_stride + columns, mask=inside, other=0.0)
            value *= u.to(tl.float32)
        tl.store(h + here * width + columns, value.to(h.dtype.element_ty), mask=inside)


def plain(gate: torch.Tensor, up: torch.Tensor | None, act: int, arch: str) -> None:
    """Launch the plain kernel as gated_act_stats is launched, its registers without a limit."""
    options = launch_options(gate.element_size(), hip=arch.startswith("gfx"))
    options.pop("maxnreg", None)
    strides = gate.stride(0), 0 if up is None else up.stride(0)
    h = torch.empty_like(gate)
    launch(_plain_kernel, (1,), gate, up, h, 0, TOKENS, WIDTH, *strides, ACT=act, **options)


def find(
    targets: list[str], dtypes: list[str], activations: list[int]
) -> Iterator[tuple[dict, Specialisation, Specialisation]]:
    """Yield what is compiled, with sums and without."""
    for arch, dtype, act, with_up in product(targets, dtypes, activations, (True, False)):
        gate = torch.empty(TOKENS, WIDTH, dtype=getattr(torch, dtype), device="meta")
        up = torch.empty_like(gate) if with_up else None
        with recorded(arch) as launches:
            gated_act_stats_triton(gate, up, torch.tensor([[0, TOKENS]]), act)
            plain(gate, up, act, arch)
        made = {one.name: specialise(one, arch) for one in launches}
        what = {"target": arch, "dtype": dtype, "act": act, "with_up": with_up}
        yield what, made["gated_act_stats"], made["plain"]


def main(targets: str, dtypes: str, activations: str) -> None:
    acts = [int(act) for act in activations.split(",")]
    found = list(find(targets.split(","), dtypes.split(","), acts))
    figures, errors = compile_all(one for _, *both in found for one in both)
    if errors:
        sys.exit("\n".join(errors.values()))
    for what, stats, without in found:
        held = {"plain_blocks": figures[without.key].blocks}
        print(json.dumps(what | asdict(figures[stats.key]) | held))


if __name__ == "__main__":
    main(*sys.argv[1:])
