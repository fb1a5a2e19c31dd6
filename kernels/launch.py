"""Every kernel is launched here, so that a launch can also be written down instead of made.

Host code works out grids, block sizes and options from shapes; the audit compiles exactly what it
would launch, for GPUs that are not there, by running it on meta tensors inside `recorded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Launch:
    """One launch as the host code asked for it.

    ``arguments`` has every parameter of the kernel by name, constants included; ``options`` are
    those of the compiler: num_warps, num_stages, and so on.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")


_record: list[Launch] | None = None
_assumed: str | None = None


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Yield a list that collects launches, made for ``arch``, which then do not happen."""
    global _record
    before, _record = _record, []
    try:
        with assumed(arch):
            yield _record
    finally:
        _record = before


@contextmanager
def assumed(arch: str) -> Iterator[None]:
    """Choose configurations as for this architecture (sm_90, gfx942, ...), wherever they run."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


@cache
def _architecture_of_gpu(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def architecture(device: torch.device) -> str:
    """Return sm_80, sm_90, gfx942 and so on, or "interpreter" where there is no GPU."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return INTERPRETER
    return _architecture_of_gpu(
        torch.cuda.current_device() if device.index is None else device.index
    )


@cache
def _multiprocessors_here() -> int:
    return torch.cuda.get_device_properties("cuda").multi_processor_count


def multiprocessors(arch: str) -> int:
    """Return how many multiprocessors (compute units) a card of this architecture has.

    The GPU at hand is asked where it is of this architecture, unless another was assumed, for a
    recorded launch must not depend on the machine. Elsewhere it is that of A100, H100, B200, MI250X
    (one die) and MI300X; 4 in the interpreter.
    """
    here = _assumed is None and torch.cuda.is_available()
    if here and _architecture_of_gpu(torch.cuda.current_device()) == arch:
        return _multiprocessors_here()
    cards = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx90a": 110, "gfx942": 304}
    return cards.get(arch, 4 if arch == INTERPRETER else 108)


def launch(kernel, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """Launch a kernel on the current device; nothing happens where the grid is empty.

    Args:
        kernel: a function under @triton.jit.
        grid: one to three numbers of programs.
        args, named: its arguments, and the compiler's options.
    """
    if 0 in grid:
        return
    if _record is None:
        kernel[grid](*args, **named)
        return
    names = kernel.arg_names
    arguments = dict(zip(names, args, strict=False)) | {
        k: v for k, v in named.items() if k in names
    }
    options = {k: v for k, v in named.items() if k not in names}
    _record.append(Launch(kernel, grid, arguments, options))
