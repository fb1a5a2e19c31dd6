"""Memory: parameters, bytes, and the peak of a fresh process that loads a model and runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from prunekit.errors import InputError


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_rss() -> int:
    """This process's peak resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(
    model: str | Path, *, dtype: str = "auto", prompt: int = 512, generate: int = 8
) -> dict[str, Any]:
    """Load a model in a fresh process, run one prefill and a few decode steps, and report.

    Returns:
        {"peak_bytes": what the model and its run added at their peak, "total_bytes": the process's
        peak, "kind": "allocated" (CUDA's allocator; "total_bytes" is then what it reserved) or
        "rss" (resident memory)}.

    Raises:
        InputError: the child could not load or run the model.
    """
    options = {"model": str(model), "dtype": dtype, "prompt": prompt, "generate": generate}
    command = [sys.executable, "-m", "prunekit.measure.memory", json.dumps(options)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"model {model}: its memory could not be measured: {reason}")
    return json.loads(lines[-1])


def _child(options: dict[str, Any]) -> dict[str, Any]:
    from prunekit.integrations.loading import load
    from prunekit.measure.throughput import decode_case, prefill_case

    before = psutil.Process().memory_info().rss
    model = load(options["model"], dtype=options["dtype"])
    prefill_case(model, 1, options["prompt"])()
    decode_case(model, 1, options["prompt"], options["generate"])()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
        return {"peak_bytes": peak, "total_bytes": reserved, "kind": "allocated"}
    return {"peak_bytes": peak_rss() - before, "total_bytes": peak_rss(), "kind": "rss"}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
