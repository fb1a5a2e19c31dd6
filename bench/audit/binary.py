"""What a compiled kernel is made of, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import triton

from bench.audit.occupancy import blocks_per_multiprocessor

_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
_NVIDIA_MEMORY = re.compile(r"\b(LDG|LDGSTS|UTMALDG|UBLKCP|STG|UTMASTG)\b((?:\.\w+)*)")
_NVIDIA_PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b(?:\.\w+)*")
_AMD_MEMORY = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)(.*)$", re.MULTILINE)
_AMD_PRODUCT = re.compile(r"\bv_mfma_\w+")


@dataclass(frozen=True)
class Figures:
    """One binary's figures.

    ``spills``: bytes of stack, or what else of it shows; ``shared``: bytes; ``blocks``: those a
    multiprocessor holds; ``mma``: the most frequent tensor-core opcode, or nothing; ``loads`` and
    ``stores``: instructions on global memory, by width.
    """

    registers: int
    spills: int
    shared: int
    blocks: int
    mma: str
    loads: dict[str, int]
    stores: dict[str, int]

    @property
    def load(self) -> str:
        """The widest load, as in LDGSTS.128."""
        return max(self.loads, key=load_rank, default="")


def load_bits(name: str) -> int:
    """Return how many bits a thread loads at once; bulk copies, which no thread makes, are widest.

    Args:
        name: as Figures.loads names it; empty for no load.
    """
    if name.startswith(("UTMALDG", "UBLKCP")):
        return 1024
    digits = re.search(r"\.(\d+)$", name)
    return int(digits[1]) if digits else 0


def load_rank(name: str) -> tuple[int, bool]:
    """Return what orders loads: their bits, then whether they go straight to shared memory."""
    return load_bits(name), name.startswith(("LDGSTS", "loadLDS"))


def analyse(compiled) -> Figures:
    """Read a kernel that `triton.compile` returned."""
    if "cubin" in compiled.asm:
        return _nvidia(compiled)
    return _amd(compiled)


def _tool(path: str, flag: str, file: str) -> str:
    return subprocess.run([path, flag, file], capture_output=True, text=True, check=True).stdout


def _nvidia(compiled) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    metadata = compiled.metadata
    moves = Counter(
        _nvidia_move(name, details.split(".")) for name, details in _NVIDIA_MEMORY.findall(sass)
    )
    return Figures(
        registers=registers,
        spills=max(stack, len(re.findall(r"\b(?:LDL|STL)\b", sass))),
        shared=metadata.shared,
        blocks=blocks_per_multiprocessor(
            f"sm_{metadata.target.arch}",
            metadata.num_warps,
            registers,
            metadata.shared,
            tensor_columns=getattr(metadata, "tmem_size", 0) or 0,
        ),
        mma=_most_frequent(_NVIDIA_PRODUCT.findall(sass)),
        loads={k: n for k, n in moves.items() if not k.startswith(("STG", "UTMASTG"))},
        stores={k: n for k, n in moves.items() if k.startswith(("STG", "UTMASTG"))},
    )


def _nvidia_move(name: str, details: list[str]) -> str:
    if name.startswith("U"):
        return name
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return f"{name}.{next((bits for d, bits in widths.items() if d in details), 32)}"


def _amd(compiled) -> Figures:
    assembly, metadata = compiled.asm["amdgcn"], compiled.metadata

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    loads, stores = Counter(), Counter()
    for kind, what, rest in _AMD_MEMORY.findall(assembly):
        to_lds = "LDS" if "lds" in what or rest.rstrip().endswith(" lds") else ""
        bits = _AMD_BITS.get(what.split("_")[-1], 8 if "byte" in what else 16)
        (loads if kind == "load" else stores)[f"{kind}{to_lds}.{bits}"] += 1
    registers = count("vgpr_count")
    return Figures(
        registers=registers,
        spills=max(
            count("vgpr_spill_count") + count("sgpr_spill_count"),
            count("private_segment_fixed_size"),
        ),
        shared=metadata.shared,
        blocks=blocks_per_multiprocessor(
            metadata.target.arch,
            metadata.num_warps,
            registers,
            metadata.shared,
            scalar_registers=count("sgpr_count"),
        ),
        mma=_most_frequent(_AMD_PRODUCT.findall(assembly)),
        loads=dict(loads),
        stores=dict(stores),
    )


def _most_frequent(opcodes: list[str]) -> str:
    return Counter(opcodes).most_common(1)[0][0] if opcodes else ""
