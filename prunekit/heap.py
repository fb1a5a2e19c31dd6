"""Memory that libraries hold beyond what they were asked for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable


def _found() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return lambda _: 0


_malloc_trim = _found()


def trim() -> None:
    """Give free memory back to the system; where the C library has no such call, do nothing.

    glibc keeps what was freed for what comes next, and in pieces: what goes through a model layer
    by layer ends up with the room of several layers.

    Cost:
        The memory is to be had anew, page by page, by what comes next.
    """
    _malloc_trim(0)


def keep_few_kernels() -> None:
    """Let torch's CPU library keep 16 of the kernels that it compiles, a shape each, not 1024.

    For work that meets each shape many times in a row. To be called before anything is computed;
    what the environment says already stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
