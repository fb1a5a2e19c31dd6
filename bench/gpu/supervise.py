"""Runs the benchmark in a process of its own, and again after it died, without what killed it.

An illegal access ends every later call to the GPU in that process, and a kernel that never ends
waits for ever. GPU time is rare, so the rest is measured nevertheless.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench.gpu.results import bury

LOST = 75  # the worker's exit status after the GPU stopped answering it
_VERDICTS = (0, 1, 2)
_MOST_RESTARTS = 20


def _wait(process: subprocess.Popen, results: Path, patience_s: float) -> str | None:
    """Wait for a process; return None, or why it was killed: it wrote nothing for so long."""
    begun = time.time()
    while process.poll() is None:
        written = results.stat().st_mtime if results.is_file() else begun
        if time.time() - max(begun, written) > patience_s:
            process.kill()
            process.wait()
            return f"nothing happened for {patience_s:.0f} s; killed"
        time.sleep(0.2)
    return None


def supervise(command: list[str], results: Path, patience_s: float) -> int:
    """Run a worker to its end, however often it has to be started, and return its exit status.

    Args:
        command: the worker's; started again with --resume.
        results: its file.
        patience_s: seconds without a new result after which it counts as stuck.
    """
    begun = time.time()
    for attempt in range(_MOST_RESTARTS + 1):
        process = subprocess.Popen([*command, "--resume"] if attempt else command)
        try:
            stuck = _wait(process, results, patience_s)
        finally:
            process.kill()  # no worker outlives an interrupted supervisor
        code = process.wait()
        if code in _VERDICTS and not stuck:
            return code
        if not results.is_file() or results.stat().st_mtime < begun:
            return code or 1  # it died before it began: what lies there is of another run
        if code != LOST:  # then it wrote down the failure itself
            bury(results, stuck or f"the process ended with status {code}")
    return 1
