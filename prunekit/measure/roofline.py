"""The time that no kernel on a card can beat, from the bytes and FLOPs it cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU's peaks: bytes a second of memory, dense 16-bit FLOPs a second of its tensor cores."""

    name: str
    arch: str
    bandwidth: float
    flops: float


# The makers' data sheets: A100 SXM 80 GB, H100 SXM, MI300X.
CARDS = (
    Card("A100", "sm_80", 2.039e12, 312e12),
    Card("H100", "sm_90", 3.35e12, 989.4e12),
    Card("MI300X", "gfx942", 5.3e12, 1307.4e12),
)


@dataclass(frozen=True)
class Bound:
    """Seconds, and whether bytes or FLOPs bind."""

    seconds: float
    binds: str


def predicted_bound(card: Card, moved: float, flops: float) -> Bound:
    """Return the larger of the times that memory and tensor cores take at their peaks.

    A bound and no forecast: kernels come near it or do not, which only a measurement tells.

    Args:
        card: its peaks.
        moved: bytes to and from memory.
        flops: of 16-bit products.
    """
    by_bytes, by_flops = moved / card.bandwidth, flops / card.flops
    if by_bytes >= by_flops:
        return Bound(by_bytes, "bytes")
    return Bound(by_flops, "FLOPs")
