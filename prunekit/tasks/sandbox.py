"""Runs a generated program where it can compute, and nothing else."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prunekit.errors import InputError

_JAIL = Path(__file__).with_name("jail.py")
_SLICE_S = 0.25


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran through to its end, without an exception or an exit before.
        parsed: it is a program at all.
        reason: why it did not pass, for people.
    """

    passed: bool
    parsed: bool
    reason: str


def check_sandbox() -> None:
    """Make sure, before long work, that a sandbox can be built here and lets a right program pass.

    Raises:
        InputError: not Linux on x86_64 or arm64, or the kernel has no seccomp.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise InputError(
            f"sandbox: got {system} on {machine}, expected Linux on x86_64 or aarch64, whose "
            "seccomp it is made of; run this in a Linux container"
        )
    outcome = run_program("import math, typing\nassert math.gcd(6, 4) == 2")
    if not outcome.passed:
        raise InputError(f"sandbox: cannot be built here: {outcome.reason}")


def run_program(
    source: str,
    *,
    cpu_seconds: int = 5,
    wall_seconds: float = 20.0,
    memory_bytes: int = 2**30,
) -> Outcome:
    """Run a Python program, in a process of its own that is locked by `jail`.

    It has no network, can neither begin nor signal a process, and can write, remove or change no
    file, not even in the empty folder it runs in; it can read files, but not tell anyone. What it
    prints is dropped. Time in which this process itself is stopped does not count as wall time.
    Whether it passed is told through a pipe, with a word that it would have to go looking for in
    its caller's frames: this guards against programs that exit early, not against ones that cheat.

    Args:
        source: the program; what it must fulfil, it asserts itself.
        cpu_seconds: processor time it may use.
        wall_seconds: time it may take, asleep or computing.
        memory_bytes: address space it may use, Python's own 20 to 50 MB included.

    Cost:
        Starting Python; a program that does not end takes cpu_seconds or wall_seconds.
    """
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as program:
        program.write(f"{nonce}\n{source}".encode(errors="replace"))
        program.seek(0)
        listen, tell = os.pipe()
        with os.fdopen(listen, "rb", buffering=0) as verdict:
            try:
                limits = (tell, cpu_seconds, memory_bytes)
                process = subprocess.Popen(
                    [sys.executable, "-s", "-B", str(_JAIL), *map(str, limits)],
                    stdin=program,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    # One order of sets, so that a program is judged alike twice.
                    env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
                    pass_fds=(tell,),
                    start_new_session=True,
                )
            finally:
                os.close(tell)
            status = _wait(process, wall_seconds)
            os.set_blocking(listen, False)
            said = (verdict.read(4096) or b"").decode(errors="replace")
    kind, _, reason = said.partition("\n")
    if kind == nonce:
        return Outcome(True, True, "")
    if not reason:
        reason = "took too long" if status is None else f"ended early, with status {status}"
    return Outcome(False, kind != "unparsable", reason)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status; None where the process had to be killed."""
    try:
        # Counted in slices: after a pause of this process the clock alone would condemn the child.
        for _ in range(max(round(seconds / _SLICE_S), 1)):
            try:
                return process.wait(_SLICE_S)
            except subprocess.TimeoutExpired:
                continue
        return None
    finally:
        process.kill()
        process.wait()
