"""Every CUDA source compiles and links, against whatever torch is installed; no GPU needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def launchers(tmp_path_factory):
    """gather.cu as an object, its code for one GPU."""
    made = tmp_path_factory.mktemp("launchers") / "gather.o"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-Xcompiler", "-fPIC"]
    run(NVCC, *flags, "-c", "-o", made, ROOT / "csrc" / "cuda" / "gather.cu")
    return made


@pytest.fixture(scope="module")
def binding(tmp_path_factory):
    made = tmp_path_factory.mktemp("binding") / "binding.o"
    includes = [f"-isystem={path}" for path in include_paths()]
    flags = ["-std=c++17", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]
    flags.append(f"-DTORCH_TARGET_VERSION={STABLE_ABI}")
    run(NVCC, *flags, "-c", *includes, "-o", made, ROOT / "csrc" / "cuda" / "binding.cpp")
    return made


def test_the_binding_compiles(binding):
    needed = run("nm", "--undefined-only", "--demangle", binding)
    assert " aoti_torch_get_current_cuda_stream\n" in needed
    assert " prunekit::gather::launch_mlp(" in needed
    assert " at::" not in needed  # nothing but the stable ABI
    assert " c10::" not in needed


PROGRAM = """
#include "gather.h"
#include <cstdio>
using namespace prunekit::gather;
int main() {
  const Matrix none{nullptr, 0, 8, 8}, wide{nullptr, 1, int64_t{1} << 31, 0};
  const Index empty{nullptr, 0, true}, one{nullptr, 1, true};
  const Projection nothing{none, none};
  std::printf("%d %d %d %d %d, ", launch_rows(none, none, empty, 2, nullptr),
              launch_rows_in_place(none, empty, 2, nullptr),
              launch_columns(none, none, empty, 2, nullptr),
              launch_columns_in_place(none, empty, 2, nullptr),
              launch_mlp(nothing, nothing, nothing, empty, 2, nullptr));
  std::printf("%d %d\\n", launch_columns(wide, wide, one, 2, nullptr),
              launch_mlp(nothing, nothing, nothing, empty, 3, nullptr));
}
"""


def test_a_program_without_torch_links(launchers, tmp_path):
    """Launchers see what is nothing to do (0) and what is invalid (1) before they ask a GPU."""
    (tmp_path / "program.cpp").write_text(PROGRAM)
    include = f"-I{ROOT / 'csrc' / 'cuda'}"
    program = tmp_path / "program"
    run(NVCC, "-std=c++17", include, "-o", program, tmp_path / "program.cpp", launchers)
    assert run(program) == "0 0 0 0 0, 1 1\n"


STREAM_OF_A_CUDA_TORCH = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
"""

# In a process of its own, since what is registered stays.
LOAD = """
import sys, torch, prunekit.ops
names = "gather_rows gather_cols gather_rows_out gather_cols_out compact_rows_ compact_cols_ "
names = (names + "compact_mlp_out").split()
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
before = [has_kernel(f"prunekit::{name}", "CUDA") for name in names]
torch.ops.load_library(sys.argv[1])
after = [has_kernel(f"prunekit::{name}", "CUDA") for name in names]
print(any(before), all(after))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: build the project")
def test_the_extension_links_and_registers(binding, launchers, tmp_path):
    """A CPU build of torch lacks only the current stream; with it, no symbol is undefined."""
    (tmp_path / "stream.cpp").write_text(STREAM_OF_A_CUDA_TORCH)
    library = Path(torch.__file__).parent / "lib"
    made = tmp_path / "extension.so"
    inputs = ["-Xcompiler", "-fPIC", binding, launchers, tmp_path / "stream.cpp"]
    strict = ["-Xlinker", "--no-undefined"]
    run(NVCC, "-shared", *strict, "-o", made, *inputs, f"-L{library}", "-ltorch_cpu", "-lc10")
    assert run(sys.executable, "-c", LOAD, made) == "False True\n"


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
    """Unaligned rows too: they load two vectors for each they store (of 8-byte words, one)."""
    for row in rows:
        assert row["wide_loads"] > 0, row
        assert row["wide_stores"] > 0, row
    loads = {(row["kernel"], row["wide_loads"]) for row in rows if "_rows<" in row["kernel"]}
    expected = {16: (4, 8), 8: (4, 4), 4: (8, 8), 2: (8, 8), 1: (8, 8)}
    names = ("gather_rows", "compact_rows")
    assert loads == {
        (f"{name}<{word}>", each[i])
        for word, each in expected.items()
        for i, name in enumerate(names)
    }


def test_unknown_architecture():
    with pytest.raises(ValueError, match="got 'sm_10'; expected sm_80, sm_90, sm_100"):
        cuda_resources(("sm_10",))
