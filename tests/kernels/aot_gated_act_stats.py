"""Compiles the kernels of gated_act_stats ahead of time and prints what came out, as JSON lines.

A script of its own, because a process that interprets Triton kernels cannot compile them:
``python aot_gated_act_stats.py TARGETS DTYPES ACTIVATIONS``, each a list with commas.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunekit_kernels import gated_act_stats as kernels
from prunekit_kernels import segment_stats
from prunekit_kernels.activations import activate

ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


# A multiprocessor's threads, blocks and shared memory in KiB; every one has 65536 registers.
MULTIPROCESSORS = {"sm_80": (2048, 32, 164), "sm_90": (2048, 32, 228), "sm_100": (2048, 32, 228)}


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


def parse_target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def compile_kernel(kernel, pointers: dict, constants: dict, options: dict, target: GPUTarget):
    """Compile with pointers, width and strides known to be multiples of 16, the rest int32."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [*pointers, *({"width", "gate_stride", "up_stride"} & {*signature})]
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in aligned
        if name not in constants
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def compile_rows(kernel, target: GPUTarget, dtype: str, act: int, with_up: bool, **replaced):
    """Compile the first pass, or the plain kernel, as the first pass is launched."""
    options = kernels.launch_options(ELEMENT_SIZE[dtype], hip=target.backend == "hip") | replaced
    pointers = dict.fromkeys(["gate", "up", "h"], f"*{dtype}")
    if kernel is not _plain_kernel:
        pointers |= {"spans": "*i64", "partials": "*fp32"}
    constants = {"ACT": act, "BLOCK_F": options.pop("BLOCK_F")} | ({} if with_up else {"up": None})
    return compile_kernel(kernel, pointers, constants, options, target)


def compile_reduce(target: GPUTarget):
    pointers = dict.fromkeys(["partials", "prompt_stats", "token_stats"], "*fp32")
    pointers["of_prompt"] = "*i32"
    constants = {"BLOCK_S": segment_stats._REDUCE_ROWS, "BLOCK_F": segment_stats._REDUCE_COLUMNS}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return compile_kernel(
        segment_stats._reduce_segments_kernel, pointers, constants, options, target
    )


def inspect_cuda(binary: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, sass = (
            subprocess.run([tool.path, flag, file.name], capture_output=True, text=True, check=True)
            for tool, flag in (
                (triton.knobs.nvidia.cuobjdump, "--dump-resource-usage"),
                (triton.knobs.nvidia.nvdisasm, "--print-code"),
            )
        )
    loads = Counter(re.findall(r"\b(?:LDG|LDGSTS|STG)\.E[\w.]*", sass.stdout))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage.stdout)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage.stdout)[1])
        + len(re.findall(r"\b(?:LDL|STL)\b", sass.stdout)),
        "loads": dict(loads),
        "wide_loads": sum(n for name, n in loads.items() if name[0] == "L" and "128" in name),
        "wide_stores": sum(n for name, n in loads.items() if name[0] == "S" and "128" in name),
    }


def inspect_hip(assembly: str) -> dict:
    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "wide_loads": assembly.count("global_load_dwordx4"),
        "wide_stores": assembly.count("global_store_dwordx4"),
    }


def inspect(compiled) -> dict:
    if "cubin" in compiled.asm:
        return inspect_cuda(compiled.asm["cubin"])
    return inspect_hip(compiled.asm["amdgcn"])


def occupancy(compiled, target: str) -> int:
    """Return how many warps a multiprocessor, or wavefronts a SIMD, holds at once."""
    registers = -(-inspect(compiled)["registers"] // 8) * 8  # handed out by eights
    if target not in MULTIPROCESSORS:
        return min(512 // registers, 8)
    threads, most_blocks, shared = MULTIPROCESSORS[target]
    warps = compiled.metadata.num_warps
    shared_of_block = compiled.metadata.shared + 1024  # the driver keeps one KiB
    blocks = min(65536 // (registers * 32 * warps), shared * 1024 // shared_of_block)
    return min(blocks, most_blocks, threads // (32 * warps)) * warps


def report_stats(target: GPUTarget, name: str, dtype: str, act: int, with_up: bool) -> None:
    stats = compile_rows(kernels._gated_act_stats_kernel, target, dtype, act, with_up)
    plain = compile_rows(_plain_kernel, target, dtype, act, with_up, maxnreg=None)
    what = {"kernel": "stats", "target": name, "dtype": dtype, "act": act, "with_up": with_up}
    held = {"occupancy": occupancy(stats, name), "plain_occupancy": occupancy(plain, name)}
    print(json.dumps(what | inspect(stats) | held), flush=True)


def main(targets: str, dtypes: str, activations: str) -> None:
    for name in targets.split(","):
        target = parse_target(name)
        what = {"kernel": "reduce", "target": name}
        print(json.dumps(what | inspect(compile_reduce(target))), flush=True)
        for dtype in dtypes.split(","):
            for act in map(int, activations.split(",")):
                for with_up in (True, False):
                    report_stats(target, name, dtype, act, with_up)


if __name__ == "__main__":
    main(*sys.argv[1:])
