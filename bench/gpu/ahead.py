"""Compiles what is checked and timed in several processes, before the one that does so.

Compiling is most of a first run, and each kernel compiles on one processor. What these processes
compile lies on disk, in Triton's and torch's caches, for the run that follows; what they find is
thrown away.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time


def compile_ahead(arguments: list[str], processes: int, limit_s: float) -> list[int]:
    """Run the checks and every contender in equal shares; return the processes' exit statuses.

    Args:
        arguments: of `python -m bench.gpu`.
        processes: how many; 0 leaves everything to the run itself.
        limit_s: seconds after which they are ended.
    """
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.gpu", *arguments, "--worker"]
        alone = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # or each starts as many more
        started = [
            subprocess.Popen(
                [*command, f"--share={i}/{processes}", f"--out={folder}/{i}"],
                env=alone,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for i in range(processes)
        ]
        try:
            for process in started:
                try:
                    process.wait(max(0.0, begun + limit_s - time.time()))
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            for process in started:
                process.kill()
        return [process.wait() for process in started]
