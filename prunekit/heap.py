"""The C library's heap: what was freed on it goes back to the system only when it is asked to."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc's malloc_trim).

    Tensors of many sizes, taken and freed by turns, leave it in pieces.

    Cost:
        Milliseconds, and the pages anew when they are next needed.
    """
    if sys.platform == "linux" and (release := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        release(0)
