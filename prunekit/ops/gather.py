"""Weight compaction: pick rows or columns of a matrix, anew, into an output or in place."""

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


def gather_rows_out_ref(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.index_select(0, index))


def gather_cols_out_ref(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.index_select(1, index))


def compact_rows_ref_(x: torch.Tensor, index: torch.Tensor) -> None:
    _check_ascending("compact_rows_", index)
    x[: index.shape[0]].copy_(x.index_select(0, index))


def compact_cols_ref_(x: torch.Tensor, index: torch.Tensor) -> None:
    _check_ascending("compact_cols_", index)
    x[:, : index.shape[0]].copy_(x.index_select(1, index))


def compact_mlp_out_ref(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    index: torch.Tensor,
    gate_out: torch.Tensor,
    up_out: torch.Tensor | None,
    down_out: torch.Tensor,
) -> None:
    gather_rows_out_ref(gate, index, gate_out)
    if up is not None:
        gather_rows_out_ref(up, index, up_out)
    gather_cols_out_ref(down, index, down_out)


def _check_ascending(name: str, index: torch.Tensor) -> None:
    if not (index[1:] > index[:-1]).all():
        raise ValueError(f"{name}: index must ascend without repeats; sort it")


def _writes_only(*_: torch.Tensor | None) -> None:
    """The fake of an operation that returns nothing: what it writes has its shape already."""


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


define(
    "gather_rows_out(Tensor x, Tensor index, Tensor(a!) out) -> ()",
    reference=gather_rows_out_ref,
    fake=_writes_only,
)
define(
    "gather_cols_out(Tensor x, Tensor index, Tensor(a!) out) -> ()",
    reference=gather_cols_out_ref,
    fake=_writes_only,
)
define(
    "compact_rows_(Tensor(a!) x, Tensor index) -> ()",
    reference=compact_rows_ref_,
    fake=_writes_only,
)
define(
    "compact_cols_(Tensor(a!) x, Tensor index) -> ()",
    reference=compact_cols_ref_,
    fake=_writes_only,
)
define(
    "compact_mlp_out(Tensor gate, Tensor? up, Tensor down, Tensor index, Tensor(a!) gate_out, "
    "Tensor(b!)? up_out, Tensor(c!) down_out) -> ()",
    reference=compact_mlp_out_ref,
    fake=_writes_only,
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


def _check_out(name: str, x: torch.Tensor, out: torch.Tensor, shape: tuple[int, int]) -> None:
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"{name}: out must be {list(shape)} {x.dtype} on {x.device}, got {list(out.shape)} "
            f"{out.dtype} on {out.device}; pass x.new_empty({list(shape)})"
        )
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(
            f"{name}: the elements of out's rows must be neighbours, got stride {out.stride(1)}"
        )


def _check_in_place(name: str, other: str, x: torch.Tensor, limit: int, kept: int) -> None:
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(
            f"{name}: the elements of x's rows must be neighbours, got stride {x.stride(1)}; "
            f"where x is transposed, call {other}(x.T, index).T"
        )
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{name}: the rows of x must not overlap; call .contiguous()")
    if kept > limit:
        raise ValueError(f"{name}: index must ascend without repeats, got {kept} of {limit}")


def gather_rows(
    x: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the rows of x that index names, in its order, repeats allowed.

    Args:
        x: [R, C], any dtype of 1, 2, 4 or 8 bytes, any strides.
        index: [K], int32 or int64, each in [0, R).
        out: [K, C], where to put them, apart from x; its rows may lie at any distance.

    Returns:
        out, or [K, C], contiguous, x's dtype and device.

    Raises:
        ValueError: x is no matrix, index no integer vector on x's device, or out does not fit.
        IndexError: an index lies outside [0, R) (on the CPU; a GPU kernel does not check).

    Cost:
        2·K·C·b bytes, b being the size of an element.
    """
    _check("gather_rows", x, index)
    if out is None:
        return call("gather_rows", x, index)
    _check_out("gather_rows", x, out, (index.shape[0], x.shape[1]))
    call("gather_rows_out", x, index, out)
    return out


def gather_cols(
    x: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the columns of x that index names, in its order, repeats allowed.

    Args:
        x: [R, C], any dtype of 1, 2, 4 or 8 bytes, any strides.
        index: [K], int32 or int64, each in [0, C).
        out: [R, K], where to put them, apart from x; its rows may lie at any distance.

    Returns:
        out, or [R, K], contiguous, x's dtype and device.

    Raises:
        ValueError: x is no matrix, index no integer vector on x's device, or out does not fit.
        IndexError: an index lies outside [0, C) (on the CPU; a GPU kernel does not check).

    Cost:
        b·R·(C + K) bytes: from half of the columns on, nearly every cache line is touched.
    """
    _check("gather_cols", x, index)
    if out is None:
        return call("gather_cols", x, index)
    _check_out("gather_cols", x, out, (x.shape[0], index.shape[0]))
    call("gather_cols_out", x, index, out)
    return out


def compact_rows_(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Move the rows of x that index names to its beginning, without a second matrix.

    Args:
        x: [R, C], any dtype of 1, 2, 4 or 8 bytes; the elements of a row are neighbours.
        index: [K], int32 or int64, ascending without repeats, each in [0, R).

    Returns:
        x[:K], a view: contiguous where x is. What x holds beyond it is left over.

    Raises:
        ValueError: x or index is not as described.
        IndexError: an index lies outside [0, R).
        On a GPU the kernel looks at no entry of index; a wrong one gives wrong rows or worse.

    Cost:
        2·K·C·b bytes, b being the size of an element, and no memory.
    """
    _check("compact_rows_", x, index)
    _check_in_place("compact_rows_", "compact_cols_", x, x.shape[0], index.shape[0])
    call("compact_rows_", x, index)
    return x[: index.shape[0]]


def compact_cols_(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Move the columns of x that index names to its left side, without a second matrix.

    Rows stay where they begin, so that rows can move at the same time: a contiguous result would
    make each row wait for those that its place overlaps.

    Args:
        x: [R, C], any dtype of 1, 2, 4 or 8 bytes; the elements of a row are neighbours.
        index: [K], int32 or int64, ascending without repeats, each in [0, C).

    Returns:
        x[:, :K], a view with x's row stride. What x holds beyond it is left over.

    Raises:
        ValueError: x or index is not as described.
        IndexError: an index lies outside [0, C).
        On a GPU the kernel looks at no entry of index; a wrong one gives wrong columns or worse.

    Cost:
        b·R·(C + K) bytes, b being the size of an element, and no memory.
    """
    _check("compact_cols_", x, index)
    _check_in_place("compact_cols_", "compact_rows_", x, x.shape[1], index.shape[0])
    call("compact_cols_", x, index)
    return x[:, : index.shape[0]]


def compact_mlp(
    gate: torch.Tensor, up: torch.Tensor | None, down: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return a layer's weights with the neurons that index names; on a GPU in one launch.

    Args:
        gate: [F, D], any dtype of 1, 2, 4 or 8 bytes, any strides.
        up: [F, D], like gate, or None where the layer has no up projection.
        down: [D, F], like gate.
        index: [F'], int32 or int64, each in [0, F), in any order.

    Returns:
        gate [F', D], up [F', D] or None, down [D, F'], each contiguous.

    Raises:
        ValueError: the matrices do not belong together, or index is no integer vector.
        IndexError: an index lies outside [0, F) (on the CPU; a GPU kernel does not check).

    Cost:
        4·F'·D·b bytes for gate and up, (F + F')·D·b for down, b being the size of an element.
    """
    for x in (gate, down) if up is None else (gate, up, down):
        _check("compact_mlp", x, index)
        if x.dtype != gate.dtype:
            raise ValueError(f"compact_mlp: expected {gate.dtype} throughout, got {x.dtype}")
    if down.shape[1] != gate.shape[0] or (up is not None and up.shape != gate.shape):
        raise ValueError(
            f"compact_mlp: expected gate [F, D], up [F, D] and down [D, F], got "
            f"{list(gate.shape)}, {None if up is None else list(up.shape)}, {list(down.shape)}"
        )
    kept = index.shape[0]
    gate_out = gate.new_empty((kept, gate.shape[1]))
    up_out = None if up is None else up.new_empty((kept, up.shape[1]))
    down_out = down.new_empty((down.shape[0], kept))
    call("compact_mlp_out", gate, up, down, index, gate_out, up_out, down_out)
    return gate_out, up_out, down_out
