"""The C++ extension: loaded, registered for the CPU, and right on every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunekit.ops.backends import EXTENSION_PROBLEM
from prunekit.ops.isa import cpu_isa
from prunekit.ops.registry import OPERATIONS

pytestmark = pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
NAME_ITS_ISA = "from prunekit.ops.isa import cpu_isa; print(cpu_isa())"


def run(*command, level):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PRUNEKIT_CPU_ISA": level, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


GATHERS = ("gather_rows", "gather_cols", "gather_rows_out", "gather_cols_out")
GATHERS += ("compact_rows_", "compact_cols_", "compact_mlp_out")


@pytest.mark.parametrize("name", [*GATHERS, "gated_act_stats", "gated_mlp"])
def test_serves_the_cpu(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekit::{name}", "CPU")
    assert "cpp" in OPERATIONS[name].backends


@pytest.mark.parametrize("level", LEVELS)
def test_variable_caps_the_instruction_set(level):
    used = run("-c", NAME_ITS_ISA, level=level).stdout.strip()
    assert used == min(level, cpu_isa(), key=LEVELS.index)


def test_unknown_instruction_set():
    result = run("-c", NAME_ITS_ISA, level="sse9")
    assert result.returncode == 1
    assert "ValueError: PRUNEKIT_CPU_ISA: got 'sse9'; expected amx_bf16" in result.stderr


@pytest.mark.skipif("PRUNEKIT_CPU_ISA" in os.environ, reason="this is a run at one level already")
@pytest.mark.parametrize("level", LEVELS)
def test_operations_at_each_level(level):
    if LEVELS.index(level) >= LEVELS.index(cpu_isa()):
        pytest.skip(f"{level} is what this process uses, or more than this CPU has")
    names = ("test_gather.py", "test_gated_act_stats.py", "test_gated_mlp.py")
    names += ("test_read_floats.py",)
    pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpp or decode or read_floats")
    result = run(*pytest_, *(str(HERE / name) for name in names), level=level)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("name", GATHERS)
def test_cuda_is_attached_only_where_it_was_built(name):
    built = torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekit::{name}", "CUDA")
    assert ("cuda" in OPERATIONS[name].backends) is built
    assert built or "built without CUDA; with nvcc" in OPERATIONS[name].unavailable["cuda"]
