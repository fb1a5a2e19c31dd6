"""Which instruction set the C++ extension's kernels use on this machine."""

from __future__ import annotations

import torch

from prunekit.ops.backends import EXTENSION_PROBLEM

_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # in the order of csrc/cpu/isa.h


def cpu_isa() -> str | None:
    """Return amx_bf16, avx512_bf16, avx512, avx2 or scalar; None without the extension.

    ``PRUNEKIT_CPU_ISA``, read once a process, caps it.

    Raises:
        ValueError: ``PRUNEKIT_CPU_ISA`` is none of these.
    """
    if EXTENSION_PROBLEM is not None:
        return None
    return _NAMES[torch.ops.prunekit.cpu_isa()]
