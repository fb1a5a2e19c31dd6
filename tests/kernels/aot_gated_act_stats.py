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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunekit_kernels import gated_act_stats as kernels

ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


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


def compile_stats(target: GPUTarget, dtype: str, act: int, with_up: bool):
    options = kernels.launch_options(ELEMENT_SIZE[dtype], hip=target.backend == "hip")
    pointers = dict.fromkeys(["gate", "up", "h"], f"*{dtype}")
    pointers |= {"spans": "*i64", "partials": "*fp32"}
    constants = {"ACT": act, "BLOCK_F": options.pop("BLOCK_F")} | ({} if with_up else {"up": None})
    return compile_kernel(kernels._gated_act_stats_kernel, pointers, constants, options, target)


def compile_reduce(target: GPUTarget):
    pointers = dict.fromkeys(["partials", "prompt_abs", "token_stats"], "*fp32")
    constants = {"BLOCK_S": kernels._REDUCE_ROWS, "BLOCK_F": kernels._REDUCE_COLUMNS}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return compile_kernel(kernels._reduce_kernel, pointers, constants, options, target)


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


def report(compiled, **what) -> None:
    cuda = "cubin" in compiled.asm
    found = inspect_cuda(compiled.asm["cubin"]) if cuda else inspect_hip(compiled.asm["amdgcn"])
    print(json.dumps(what | found), flush=True)


def main(targets: str, dtypes: str, activations: str) -> None:
    for name in targets.split(","):
        target = parse_target(name)
        report(compile_reduce(target), kernel="reduce", target=name)
        for dtype in dtypes.split(","):
            for act in map(int, activations.split(",")):
                for with_up in (True, False):
                    compiled = compile_stats(target, dtype, act, with_up)
                    what = {"dtype": dtype, "act": act, "with_up": with_up}
                    report(compiled, kernel="stats", target=name, **what)


if __name__ == "__main__":
    main(*sys.argv[1:])
