"""What nvcc makes of the CUDA gather kernels: registers, spills, 128-bit accesses, blocks an SM.

Nothing runs here: these are facts of the compiled code, for GPUs that this machine need not have.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHS = ("sm_80", "sm_90", "sm_100")

# Of one SM: threads, shared memory, blocks. All have 65,536 registers and take 1 KiB of shared
# memory for each block. Source: the CUDA C++ programming guide's table of compute capabilities.
_LIMITS = {"sm_80": (2048, 164 << 10, 32), "sm_90": (2048, 228 << 10, 32)}
_LIMITS["sm_100"] = _LIMITS["sm_90"]
_REGISTERS = 65536
_TYPES = {"h": "u8", "t": "u16", "j": "u32", "m": "u64", "y": "u64"}
_FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-cubin")


def cuda_resources(archs: tuple[str, ...] = ARCHS, cache: Path | str | None = None) -> list[dict]:
    """Compile csrc/cuda/gather.cu and return a row for each kernel and architecture.

    Args:
        archs: any of sm_80, sm_90 and sm_100.
        cache: a folder that keeps the rows, by a hash of the sources and of the compiler.

    Returns:
        Rows of kernel, arch, threads, registers, spill_bytes, stack, shared, blocks_per_sm,
        wide_loads and wide_stores (how many LDG.128 and STG.128), sorted.

    Raises:
        FileNotFoundError: nvcc, or a cuobjdump beside it or in Triton's wheel, is missing.
        ValueError: an architecture is unknown.
    """
    for arch in archs:
        if arch not in _LIMITS:
            raise ValueError(f"cuda_resources: got {arch!r}; expected {', '.join(_LIMITS)}")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("cuda_resources: nvcc is not on the PATH; install the CUDA toolkit")
    kept = None if cache is None else Path(cache) / f"cuda-{_fingerprint(nvcc, archs)}.json"
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())
    rows = [row for arch in archs for row in _compile(nvcc, arch)]
    rows.sort(key=lambda row: (row["kernel"], archs.index(row["arch"])))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(rows))
    return rows


def _fingerprint(nvcc: str, archs: tuple[str, ...]) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(SOURCES.glob("gather*")):
        digest.update(path.read_bytes())
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    digest.update(" ".join(archs).encode())
    return digest.hexdigest()[:16]


def _cuobjdump(nvcc: str) -> str:
    beside = Path(nvcc).resolve().parent / "cuobjdump"
    if beside.exists():
        return str(beside)
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError as error:
        raise FileNotFoundError("cuda_resources: no cuobjdump, and Triton is missing") from error
    return triton.knobs.nvidia.cuobjdump.path


def _compile(nvcc: str, arch: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "gather.cubin")
        command = [nvcc, *_FLAGS, f"-arch={arch}", "-o", cubin, str(SOURCES / "gather.cu")]
        log = _run(command).stderr
        code = _run([_cuobjdump(nvcc), "-sass", cubin]).stdout
    return [_row(name, facts, code, arch) for name, facts in _ptxas_facts(log).items()]


def _run(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done


def _ptxas_facts(log: str) -> dict[str, dict]:
    """By mangled name, from the lines of `-Xptxas -v`."""
    facts = {}
    for part in log.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
        shared = re.search(r"(\d+) bytes smem", part)
        facts[part.split("'", 1)[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spill_bytes": int(spills[2]) + int(spills[3]),
            "stack": int(spills[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return facts


def _row(mangled: str, facts: dict, code: str, arch: str) -> dict:
    threads = _threads(mangled)
    body = re.split(r"Function : ", code.split(f"Function : {mangled}\n", 1)[1], maxsplit=1)[0]
    opcodes = re.findall(r"\b(?:LDG|STG)\.E[\w.]*", body)
    return {
        "kernel": _short_name(mangled),
        "arch": arch,
        "threads": threads,
        **facts,
        "blocks_per_sm": _blocks_per_sm(arch, threads, facts["registers"], facts["shared"]),
        "wide_loads": sum(o.startswith("LDG") and ".128" in o for o in opcodes),
        "wide_stores": sum(o.startswith("STG") and ".128" in o for o in opcodes),
    }


def _short_name(mangled: str) -> str:
    """gather_rows<16> for words of 16 bytes, gather_cols<u16> for elements of 2."""
    name, word, element = re.search(
        r"\d((?:gather|compact)_[a-z]+)_kernelI(?:Li(\d+)E|([a-z]))E", mangled
    ).groups()
    return f"{name}<{word or _TYPES[element]}>"


def _threads(mangled: str) -> int:
    header = (SOURCES / "gather_index.h").read_text()
    name = "STRIP_THREADS" if "compact_rows_kernel" in mangled else "THREADS"
    return int(re.search(rf"\bint {name} = (\d+);", header)[1])


def _blocks_per_sm(arch: str, threads: int, registers: int, shared: int) -> int:
    """Registers are handed out to warps, 256 at a time."""
    most_threads, most_shared, most_blocks = _LIMITS[arch]
    warps = threads // 32
    warps_by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256)
    by_shared = most_shared // (shared + 1024)
    return min(most_blocks, most_threads // threads, warps_by_registers // warps, by_shared)


def main() -> None:
    """Print the rows as a table."""
    rows = cuda_resources()
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))


if __name__ == "__main__":
    main()
