"""Runs the benchmark in a process of its own, and again after it died, without what killed it.

An illegal access ends every later call to the GPU in that process, and a kernel that never ends
waits for ever. GPU time is rare, so the rest is measured nevertheless.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench.gpu.results import bury
from prunekit.files import read_json

LOST = 75  # the worker's exit status after the GPU stopped answering it
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
        if not results.is_file() or results.stat().st_mtime < begun:
            return code or 1  # it died before it began: what lies there is of another run
        if read_json(results)["finished"]:
            return code
        # After LOST the worker has written the failure itself; otherwise, where nothing was
        # running, the next one would only end in the same way.
        why = stuck or f"the process ended with status {code}"
        if code != LOST and not bury(results, why):
            return 1
    return 1
