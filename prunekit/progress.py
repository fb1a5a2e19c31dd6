"""Progress on stderr, when someone is there to see it."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, label: str, unit: str, *, quiet: bool = False) -> tqdm:
    """A tqdm bar on stderr; silent when stderr is no terminal or ``quiet`` is set."""
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        disable=quiet or not sys.stderr.isatty(),
        leave=False,
    )
