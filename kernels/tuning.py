"""Which block sizes a kernel runs with: measured where a GPU was at hand, reasoned elsewhere.

``tuned.json`` holds what was measured on GPUs, and nothing else: its keys name the kernel, the
architecture, the dtype and the shape (tokens rounded up to a power of two). Where it says nothing,
a kernel's own reasoned default serves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

TABLE = Path(__file__).with_name("tuned.json")
Config = dict[str, int | bool | str]
_Table = TypeVar("_Table", bound=dict[str, Config])

_override: dict[str, Config] = {}
_serving: dict[str, Config] | None = None


@cache
def _measured() -> dict[str, Config]:
    return json.loads(TABLE.read_text())


def table() -> dict[str, Config]:
    """Return what was measured, by key, or the table that serves instead."""
    return _measured() if _serving is None else _serving


@cache
def key(kernel: str, arch: str, dtype: torch.dtype, tokens: int, *shape: int) -> str:
    """Return the table's key, as in ``dual_product sm_90 bfloat16 512x1536x8960``."""
    rounded = 1 << max(tokens - 1, 0).bit_length()
    sizes = "x".join(map(str, (rounded, *shape)))
    return f"{kernel} {arch} {str(dtype).removeprefix('torch.')} {sizes}"


def choose(
    kernel: str, arch: str, dtype: torch.dtype, tokens: int, *shape: int, default: Config
) -> Config:
    """Return the configuration to launch a kernel with.

    Args:
        kernel: its name in the table, for instance ``dual_product``.
        arch: as `launch.architecture` gives it.
        dtype, tokens, shape: what the speed depends on; tokens fall into powers of two.
        default: serves where nothing was measured.
    """
    if kernel in _override:
        return _override[kernel]
    return table().get(key(kernel, arch, dtype, tokens, *shape), default)


@contextmanager
def serving(table: _Table) -> Iterator[_Table]:
    """Inside the block, let kernels choose from this table in the place of ``tuned.json``."""
    global _serving
    before, _serving = _serving, table
    try:
        yield table
    finally:
        _serving = before


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Inside the block, launch this kernel with this configuration, whatever the table says."""
    before = dict(_override)
    _override[kernel] = config
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
