"""What the makers say a card can do, for the share of it that a measurement reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Bytes a second from memory, and dense bf16 FLOP a second."""

    bandwidth: float
    flops: float


# By a part of torch's name of the device, the first that fits. Sources: the data sheets of NVIDIA
# A100, H100 and H200 and of AMD Instinct MI300X; FLOP without sparsity.
PEAKS = {
    "A100-SXM4-80GB": Peak(2.039e12, 312e12),
    "A100 80GB PCIe": Peak(1.935e12, 312e12),
    "A100": Peak(1.555e12, 312e12),
    "H100 80GB HBM3": Peak(3.35e12, 989.4e12),
    "H100 PCIe": Peak(2.0e12, 756e12),
    "H100 NVL": Peak(3.9e12, 835e12),
    "H200 NVL": Peak(4.8e12, 835e12),
    "H200": Peak(4.8e12, 989.4e12),
    "MI300X": Peak(5.3e12, 1307.4e12),
}


def peak_of(device: str) -> Peak | None:
    """Return a card's peak by its name, or None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def rates(seconds: float, moved: int, flops: int, peak: Peak | None) -> dict[str, float | None]:
    """Return GB/s, TFLOP/s and the share of what the card's peak allows.

    Args:
        seconds: what one run took.
        moved, flops: the least bytes and FLOP that the result takes.
        peak: the card's, or None.

    Returns:
        ``share`` is the time that the slower of memory and arithmetic would take at its peak, over
        the time taken.
    """
    floor = None if peak is None else max(moved / peak.bandwidth, flops / peak.flops)
    return {
        "gb_s": moved / seconds / 1e9,
        "tflop_s": flops / seconds / 1e12,
        "share": None if floor is None else floor / seconds,
    }
