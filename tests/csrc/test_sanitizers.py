"""The C++ extension under AddressSanitizer and UBSan: its operations' tests run on such a build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("csrc", "kernels", "prunekit", "tests", "bench", "setup.py", "pyproject.toml")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
OPTIONS = "detect_leaks=0:alloc_dealloc_mismatch=0"  # Python and torch keep what they have


def library(name):
    """Where the compiler has a sanitizer's runtime, which has to be in the process first."""
    said = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(said.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"g++ has no {name}")
    return str(path.resolve())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_and_nothing_undefined(tmp_path):
    preloaded = " ".join(map(library, ("libasan.so", "libubsan.so")))
    for name in NEEDED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    place = {"cwd": tmp_path, "capture_output": True, "text": True}
    flags = os.environ | {"CFLAGS": FLAGS, "LDFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(command, env=flags, **place)
    (extension,) = (tmp_path / "prunekit").glob("_C*.so")
    assert b"__asan_report_store" in extension.read_bytes(), built.stdout + built.stderr
    watched = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": OPTIONS, "OMP_NUM_THREADS": "2"}
    watched["UBSAN_OPTIONS"] = "print_stacktrace=1"
    where = "import prunekit, torch; print(*torch.ops.loaded_libraries)"
    tried = subprocess.run([sys.executable, "-c", where], env=os.environ | watched, **place)
    assert tried.stdout.strip() == str(extension), tried.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops", "tests/test_nn.py"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:randomly"], env=os.environ | watched, **place
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert " passed" in run.stdout
