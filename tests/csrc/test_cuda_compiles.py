"""Every CUDA source compiles, against the headers of whatever torch is installed; no GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from bench.audit_cuda import cuda_resources

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
STABLE_ABI = re.search(r'STABLE_ABI_OF_TORCH_2_10 = "(\w+)"', (ROOT / "setup.py").read_text())[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What ptxas says, twice: compiled, and from the cache that this left."""
    folder = tmp_path_factory.mktemp("resources")
    compiled = cuda_resources(cache=folder)
    assert cuda_resources(cache=folder) == compiled
    assert len(list(folder.iterdir())) == 1
    return compiled


def test_the_binding_compiles(tmp_path):
    includes = [f"-isystem={path}" for path in include_paths()]
    macros = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    source = ROOT / "csrc" / "cuda" / "binding.cpp"
    command = [NVCC, "-std=c++17", "-c", *macros, *includes, "-o", tmp_path / "binding.o", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = ["nm", "--undefined-only", "--demangle", tmp_path / "binding.o"]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " aoti_torch_get_current_cuda_stream\n" in needed
    assert " prunekit::gather::launch_mlp(" in needed
    assert " at::" not in needed  # nothing but the stable ABI
    assert " c10::" not in needed


def test_every_source_is_one_of_these():
    compiled = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.c*")}
    assert compiled == {"binding.cpp", "gather.cu"}


def test_kernels_fit(rows):
    names = {row["kernel"] for row in rows}
    assert len(names) == 18
    assert len(rows) == 3 * len(names)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= 48 << 10, row
        warps = row["blocks_per_sm"] * row["threads"] // 32
        assert warps >= 12, row


def test_vectors_move_as_vectors(rows):
    for row in rows:
        name, parameter = row["kernel"].rstrip(">").split("<")
        vectors = parameter == "16" or name in ("gather_cols", "compact_mlp")
        assert (row["wide_loads"] > 0) is vectors, row
        assert (row["wide_stores"] > 0) is vectors, row
    assert {r["wide_loads"] for r in rows if r["kernel"] == "gather_rows<16>"} == {4}
    assert {r["wide_loads"] for r in rows if r["kernel"] == "compact_rows<16>"} == {8}


def test_unknown_architecture():
    with pytest.raises(ValueError, match="got 'sm_10'; expected sm_80, sm_90, sm_100"):
        cuda_resources(("sm_10",))
