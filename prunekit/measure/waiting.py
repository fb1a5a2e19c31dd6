"""How long this process waited for a processor that others had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_THREADS = Path("/proc/self/task")


class Waiting:
    """Watches from when it is made; where the system does not tell, it sees no waiting."""

    def __init__(self) -> None:
        self._begun = _times()

    def share(self) -> float:
        """Of the time that its threads could have computed, the part that they stood in line."""
        ran, stood = (now - then for now, then in zip(_times(), self._begun, strict=True))
        return max(0.0, stood) / max(1.0, ran + stood)


def _times() -> tuple[int, int]:
    """Nanoseconds that all threads have run, and have been ready to and did not."""
    found = list(_threads())
    return sum(ran for ran, _ in found), sum(stood for _, stood in found)


def _threads() -> Iterator[tuple[int, int]]:
    for thread in _THREADS.glob("*"):
        try:
            ran, stood, _ = map(int, (thread / "schedstat").read_text().split())
        except (OSError, ValueError):  # a thread that has just ended, or a system without it
            continue
        yield ran, stood
