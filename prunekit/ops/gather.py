"""Weight compaction: pick rows or columns of a matrix by index."""

from __future__ import annotations

import torch

from prunekit.ops.registry import call, define


def gather_rows_ref(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, index).contiguous()


def gather_cols_ref(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.index_select(1, index).contiguous()


def _gather_rows_fake(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.new_empty((index.shape[0], x.shape[1]))


def _gather_cols_fake(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], index.shape[0]))


define(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    reference=gather_rows_ref,
    fake=_gather_rows_fake,
)
define(
    "gather_cols(Tensor x, Tensor index) -> Tensor",
    reference=gather_cols_ref,
    fake=_gather_cols_fake,
)


def _check(name: str, x: torch.Tensor, index: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: x must be a matrix [R, C], got {x.dim()} dimensions")
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: index must be a vector of int32 or int64, got {index.dtype} with "
            f"{index.dim()} dimensions; call .to(torch.int64)"
        )
    if index.device != x.device:
        raise ValueError(f"{name}: index is on {index.device}, x on {x.device}; move one of them")


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows of x that index names, in its order, repeats allowed.

    Args:
        x: [R, C], any dtype of 1, 2, 4 or 8 bytes, any strides.
        index: [K], int32 or int64, each in [0, R).

    Returns:
        [K, C], contiguous, x's dtype and device.

    Raises:
        ValueError: x is no matrix, or index no integer vector on x's device.
        IndexError: an index lies outside [0, R) (on the CPU; a GPU kernel does not check).

    Cost:
        2·K·C·b bytes, b being the size of an element.
    """
    _check("gather_rows", x, index)
    return call("gather_rows", x, index)


def gather_cols(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the columns of x that index names, in its order, repeats allowed.

    Args:
        x: [R, C], any dtype of 1, 2, 4 or 8 bytes, any strides.
        index: [K], int32 or int64, each in [0, C).

    Returns:
        [R, K], contiguous, x's dtype and device.

    Raises:
        ValueError: x is no matrix, or index no integer vector on x's device.
        IndexError: an index lies outside [0, C) (on the CPU; a GPU kernel does not check).

    Cost:
        b·R·(C + K) bytes: from half of the columns on, nearly every cache line is touched.
    """
    _check("gather_cols", x, index)
    return call("gather_cols", x, index)
