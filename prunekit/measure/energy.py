"""Energy, where a machine counts it: NVML on NVIDIA GPUs, RAPL on CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
_LEAST_S = 1.0  # counters move every few milliseconds; a GPU's every 20 to 100


@dataclass(frozen=True)
class Counter:
    """Joules since some moment, of everything that runs on the device.

    Attributes:
        name: NVML or RAPL.
        joules: reads it.
        wraps: the joules at which it begins anew; infinity for never.
    """

    name: str
    joules: Callable[[], float]
    wraps: float = float("inf")


def counters_of(device: torch.device, powercap: Path = POWERCAP) -> list[Counter]:
    """What counts a device's energy here; none where nothing does, or where reading is forbidden.

    Args:
        device: a GPU's own counter, or those of all CPU packages.
        powercap: where Linux has the CPU's.
    """
    found = _nvml(device) if device.type == "cuda" else _rapl(powercap)
    try:
        for counter in found:
            counter.joules()
    except (OSError, RuntimeError, ValueError):
        return []
    return found


def _rapl(powercap: Path) -> list[Counter]:
    """One for each package; their parts (cores, memory) are counted within them."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's go by this name too
        if zone.name.count(":") != 1:
            continue
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue
            wraps = int((zone / "max_energy_range_uj").read_text()) * 1e-6
        except (OSError, ValueError):
            continue
        energy = zone / "energy_uj"
        found.append(Counter("RAPL", lambda path=energy: int(path.read_text()) * 1e-6, wraps))
    return found


def _nvml(device: torch.device) -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return []

    def joules() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3
        except pynvml.NVMLError as error:
            raise RuntimeError(str(error)) from None

    return [Counter("NVML", joules)]


def joules_of(
    run: Callable[[], None],
    counters: list[Counter],
    least_s: float = _LEAST_S,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Joules of one run, the idle device's included: the mean over as many as take a second.

    Args:
        run: waits for its device.
        counters: from `counters_of`; None is returned where there is none.
        least_s: how long to repeat it.
        clock: seconds.
    """
    if not counters:
        return None
    before = [counter.joules() for counter in counters]
    until, runs = clock() + least_s, 0
    while runs == 0 or clock() < until:
        run()
        runs += 1
    spent = 0.0
    for counter, start in zip(counters, before, strict=True):
        now = counter.joules()
        spent += now - start if now >= start else now - start + counter.wraps
    return spent / runs
