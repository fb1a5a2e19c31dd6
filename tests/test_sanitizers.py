"""The C++ extension built under AddressSanitizer and UBSan, and its operations' tests run there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
SOURCES = ("csrc", "kernels", "prunekit", "tests", "setup.py", "pyproject.toml", "README.md")

# A tensor that says it has a row more than its memory: what reads it all reads too much.
TOO_LONG = """
import ctypes, torch, prunekit
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = (ctypes.c_char * (5 * 64 * 4)).from_address(libc.malloc(4 * 64 * 4))
rows = torch.frombuffer(memory, dtype=torch.float32).view(5, 64)
torch.ops.prunekit.gather_rows(rows[:ROWS], torch.arange(ROWS))
print(*torch.ops.loaded_libraries)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the project with such a build in it, and the environment to run it in."""
    runtimes = [library(name) for name in ("libasan.so", "libubsan.so")]
    copy = tmp_path_factory.mktemp("sanitized")
    for name in SOURCES:
        source, target = ROOT / name, copy / name
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    flags = {"CFLAGS": f"-O1 -fno-omit-frame-pointer {SANITIZERS}", "LDFLAGS": SANITIZERS}
    built = run([sys.executable, "setup.py", "build_ext", "--inplace"], copy, os.environ | flags)
    assert list((copy / "prunekit").glob("_C*.so")), built.stderr
    options = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    options["UBSAN_OPTIONS"] = "print_stacktrace=1"
    for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):  # what a test prints before it dies is lost
        options[name] += f":log_path={copy / 'report'}"
    return copy, os.environ | options


def library(name: str) -> str:
    """Where the compiler keeps a runtime."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    found = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(found):
        pytest.skip(f"the compiler comes without {name}")
    return found


def reported(folder: Path) -> str:
    """What the sanitizers wrote since this was asked for last."""
    found = sorted(folder.glob("report*"))
    text = "\n".join(path.read_text(errors="replace")[:4000] for path in found)
    for path in found:
        path.unlink()
    return text


def run(command, folder, environment):
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.slow
def test_what_reads_too_far_is_found(sanitized):
    folder, environment = sanitized
    code = TOO_LONG.replace("ROWS", "4")
    fine = run([sys.executable, "-c", code], folder, environment)
    assert fine.returncode == 0, fine.stderr
    assert Path(fine.stdout.split()[-1]).parent.parent == folder  # none but this build is loaded
    broken = run([sys.executable, "-c", TOO_LONG.replace("ROWS", "5")], folder, environment)
    assert broken.returncode != 0
    assert "heap-buffer-overflow" in reported(folder)


@pytest.mark.slow
def test_operations_touch_no_memory_but_their_own(sanitized):
    """Those of every instruction set that this processor has: the tests run once in each."""
    folder, environment = sanitized
    found = run([sys.executable, "-m", "pytest", "-q", "tests/ops"], folder, environment)
    assert found.returncode == 0, found.stdout[-4000:] + reported(folder)
    assert not reported(folder)
    assert " passed" in found.stdout
