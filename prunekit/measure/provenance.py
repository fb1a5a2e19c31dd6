"""Where a figure came from: machine, versions, revision, command."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from prunekit.ops.isa import cpu_isa

_PACKAGES = ("prunekit", "torch", "transformers", "triton", "safetensors")


def processor_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name() -> str:
    """The GPU that torch would use, or the processor and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide a result; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _settings() -> dict[str, str]:
    """What the system says of clocks and the GPU's driver, where it may be read."""
    cpu, gpu = Path("/sys/devices/system/cpu/cpu0/cpufreq"), Path("/proc/driver/nvidia/version")
    found = {}
    try:
        if (cpu / "scaling_governor").is_file():
            found["governor"] = (cpu / "scaling_governor").read_text().strip()
        if gpu.is_file():
            found["driver"] = gpu.read_text().splitlines()[0].strip()
    except OSError:
        pass
    return found


def _revision() -> dict[str, Any]:
    """The source tree's revision, where prunekit runs from one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return {}
    try:
        git = ["git", "-C", str(folder)]
        run = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"revision": head, "dirty": bool(changed)}


def provenance(**more: Any) -> dict[str, Any]:
    """Facts that belong beside every result: device and driver, versions, revision, command."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "cpu_isa": cpu_isa(),
        "system": f"{platform.system()} {platform.release()}",
        **_settings(),
        "versions": versions(),
        **_revision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **more,
    }
