"""The CUDA gathers' machine code, where nvcc is installed: the same rules, without budgets.

Their figures move with nvcc, whose version nobody pins, so only what is absolute is held.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from bench.audit.table import aligned
from bench.audit_cuda import cuda_resources


def rows(cache: Path) -> list[dict[str, Any]]:
    """Return a row for each kernel and architecture; none without nvcc."""
    return cuda_resources(cache=cache) if shutil.which("nvcc") else []


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Return what spills, and what lacks 128-bit loads or stores.

    Rows copied by words of 1 to 8 bytes are excused: they are those that lie on no multiple of 16.
    """
    lines = []
    for row in rows:
        what = f"{row['kernel']} {row['arch']}"
        if spilled := max(row["spill_bytes"], row["stack"]):
            lines.append(f"{what}: spills {spilled} bytes, expected none")
        unaligned = re.search(r"_rows<[1248]>", row["kernel"])
        if not unaligned and not (row["wide_loads"] and row["wide_stores"]):
            lines.append(f"{what}: no 128-bit loads or no 128-bit stores")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each kernel and architecture."""
    if not rows:
        return "CUDA gathers: not compiled, nvcc is not on the PATH"
    figures = ("threads", "registers", "spill_bytes", "shared", "blocks_per_sm")
    heading = (
        "CUDA kernel", "arch", "threads", "registers", "spills", "shared", "blocks", "LDG.128",
        "STG.128",
    )  # fmt: skip
    names = ("kernel", "arch", *figures, "wide_loads", "wide_stores")
    return aligned(heading, [[str(row[name]) for name in names] for row in rows], left=2)
