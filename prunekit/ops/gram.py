"""The Gram matrix of activations, accumulated batch by batch, one triangle of it."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from prunekit.ops.registry import LIBRARY, call, define

_BLOCK = 512  # columns of the Gram matrix a product; the triangle skips what lies below them

# Rows of zeros round a batch up to a multiple of this: oneDNN compiles and keeps each product of a
# new shape, and no two batches have as many tokens.
_ROWS = 128


def gram_update_ref(gram: torch.Tensor, h: torch.Tensor) -> None:
    wide = h.to(gram.dtype)
    gram += wide.T @ wide


def _gram_update_fake(gram: torch.Tensor, h: torch.Tensor) -> None:
    return None


@contextmanager
def bf16_products():
    """Let oneDNN multiply fp32 as bf16 with fp32 sums: exact for matrices of bf16 values."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _gram_update_cpu(gram: torch.Tensor, h: torch.Tensor) -> None:
    if h.dtype == torch.bfloat16:
        wide = torch.zeros(len(h) + -len(h) % _ROWS, h.shape[1])
        wide[: len(h)] = h
        with bf16_products():
            gram_update_tiled(gram, wide)
    else:
        gram_update_tiled(gram, h)


def gram_update_tiled(gram: torch.Tensor, h: torch.Tensor) -> None:
    """Add hᵀh to the upper triangle by torch's products, a strip of columns at a time."""
    h, width = h.to(gram.dtype), h.shape[1]
    for low in range(0, width, _BLOCK):
        high = min(low + _BLOCK, width)
        gram[:high, low:high].addmm_(h[:, :high].T, h[:, low:high])


_OPERATION = define(
    "gram_update(Tensor(a!) gram, Tensor h) -> ()",
    reference=gram_update_ref,
    fake=_gram_update_fake,
)
_OPERATION.backends["cpp"] = _gram_update_cpu
LIBRARY.impl("gram_update", _gram_update_cpu, "CPU")


def gram_update(gram: torch.Tensor, h: torch.Tensor) -> None:
    """Add hᵀh to the upper triangle of gram, in place.

    What lies strictly below the diagonal is left unspecified until `symmetrize_` mirrors it.

    Args:
        gram: [F, F], fp32 or fp64, contiguous; changed in place.
        h: [T, F], bf16/fp16/fp32/fp64.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Cost:
        T·F² FLOP (the full product takes twice as many) and about 4·F² bytes each way.
    """
    width = h.shape[-1]
    if h.dim() != 2 or gram.shape != (width, width) or not gram.is_contiguous():
        raise ValueError(
            f"gram_update: gram must be a contiguous [F, F] for h [T, F], got "
            f"{tuple(gram.shape)} for {tuple(h.shape)}"
        )
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram_update: gram must be fp32 or fp64, got {gram.dtype}")
    call("gram_update", gram, h)


def symmetrize_(gram: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of gram onto the lower one, in place, and return gram."""
    lower = torch.tril_indices(*gram.shape, offset=-1, device=gram.device)
    gram[lower[0], lower[1]] = gram[lower[1], lower[0]]
    return gram
