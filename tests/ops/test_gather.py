"""The gathers, anew and in place: exact, on every backend, for every layout, element and index."""

import pytest
import torch

from prunekit.ops import (
    compact_cols_,
    compact_mlp,
    compact_rows_,
    force_backend,
    gather_cols,
    gather_rows,
)
from prunekit.ops.backends import EXTENSION_PROBLEM

cpp = pytest.param(
    "cpp", marks=pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))
)
backends = pytest.mark.parametrize("backend", ["reference", cpp])

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.int32, torch.float32]
DTYPES += [torch.int64, torch.float64]
# One column, less than a vector, just a vector of each size and its neighbours, many vectors.
WIDTHS = [1, 7, 31, 32, 33, 64, 65, 129, 1000]


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randint(0, 251, (rows, columns))
    return x % 2 == 0 if dtype == torch.bool else x.to(dtype)


def sorted_index(size: int, count: int) -> torch.Tensor:
    return torch.randperm(size)[:count].sort().values


def framed(rows: int, columns: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix within a larger one, whose rim nothing may touch; and the larger one."""
    frame = torch.full((rows + 2, columns + 9), 77).to(like.dtype)
    return frame[1:-1, 4:-5], frame


def rim_untouched(frame: torch.Tensor) -> bool:
    rim = frame.clone()
    rim[1:-1, 4:-5] = 77
    return bool((rim == torch.full_like(frame, 77)).all())


def picked(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows that index names, one by one: the definition."""
    rows = [x[i] for i in index.tolist()]
    return torch.stack(rows) if rows else x[:0]


def check(backend: str, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    with force_backend(backend):
        kept_rows, kept_columns = gather_rows(x, rows), gather_cols(x, columns)
    assert torch.equal(kept_rows, picked(x, rows))
    assert torch.equal(kept_columns, picked(x.T, columns).T)
    for out in (kept_rows, kept_columns):
        assert out.is_contiguous()
        assert out.dtype == x.dtype


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_half_of_the_rows_and_columns(backend, dtype, width):
    x = matrix(9, width, dtype)
    check(backend, x, sorted_index(9, 5), sorted_index(width, max(1, width // 2)))


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 1, 3, 50, 199, 200])
def test_sparse_to_complete(backend, dtype, kept):
    x = matrix(5, 200, dtype)
    check(backend, x, sorted_index(5, min(kept, 5)), sorted_index(200, kept))


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_any_order_with_repeats(backend, dtype):
    x = matrix(40, 130, dtype)
    check(backend, x, torch.randint(0, 40, (77,)), torch.randint(0, 130, (301,)))
    check(backend, x, torch.tensor([39, 39, 0]), torch.arange(129, -1, -1))


@backends
def test_index_at_both_ends(backend):
    x = matrix(3, 100, torch.bfloat16)
    check(backend, x, torch.tensor([0, 2]), torch.tensor([0, 99]))
    check(backend, x, torch.tensor([0, 2]), torch.arange(36, 100))


@backends
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_types_and_strides(backend, index_dtype):
    x = matrix(20, 90, torch.float32)
    rows, columns = sorted_index(20, 10).to(index_dtype), sorted_index(90, 44).to(index_dtype)
    check(backend, x, rows, columns)
    check(backend, x, rows[::2], columns[::3])


@backends
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.T,
        lambda x: x[:, 3:90],
        lambda x: x[1::3],
        lambda x: x[:, ::2],
        lambda x: x[2:3].expand(7, -1),
        lambda x: x[:, :1],
    ],
    ids=["transposed", "columns", "every third row", "every second column", "expanded", "one"],
)
def test_layouts(backend, layout):
    x = layout(matrix(30, 120, torch.bfloat16))
    check(backend, x, torch.arange(0, x.shape[0], 2), torch.arange(0, x.shape[1], 2))


@backends
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(backend, shape):
    x = torch.empty(shape)
    every_row, every_column = torch.arange(shape[0]), torch.arange(shape[1])
    with force_backend(backend):
        assert gather_rows(x, every_row).shape == shape
        assert gather_cols(x, every_column).shape == shape


@backends
def test_nan_payloads_and_signed_zeros_survive(backend):
    bits = torch.randint(-(2**15), 2**15, (16, 96), dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    rows, columns = sorted_index(16, 8), sorted_index(96, 50)
    with force_backend(backend):
        assert torch.equal(gather_rows(x, rows).view(torch.int16), bits[rows])
        assert torch.equal(gather_cols(x, columns).view(torch.int16), bits[:, columns])


@pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))
@pytest.mark.parametrize(("gather", "limit"), [(gather_rows, 5), (gather_cols, 70)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("beyond", [0, 2**30])
def test_index_out_of_range(gather, limit, index_dtype, beyond):
    x = matrix(5, 70, torch.bfloat16)
    for bad in (limit + beyond, -1 - beyond):
        index = torch.tensor([0, 1, 2, bad], dtype=index_dtype)
        expected = rf"{gather.__name__}: index {bad} at position 3 is outside \[0, {limit}\)"
        with pytest.raises(IndexError, match=expected):
            gather(x, index)


def test_reference_refuses_what_is_out_of_range():
    with force_backend("reference"), pytest.raises(IndexError):
        gather_rows(torch.ones(5, 3), torch.tensor([7]))


@pytest.mark.parametrize("gather", [gather_rows, gather_cols])
def test_wrong_arguments(gather):
    x = torch.ones(4, 4)
    with pytest.raises(ValueError, match="index must be a vector of int32 or int64, got"):
        gather(x, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="index must be a vector"):
        gather(x, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="x must be a matrix"):
        gather(torch.ones(4), torch.tensor([0]))


@pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))
def test_elements_too_wide():
    with pytest.raises(ValueError, match="elements of 1, 2, 4 or 8 bytes, got 16"):
        gather_cols(torch.ones(2, 2, dtype=torch.complex128), torch.tensor([0]))


@pytest.mark.parametrize("op", ["gather_rows", "gather_cols"])
def test_opcheck(op):
    overload = getattr(torch.ops.prunekit, op).default
    torch.library.opcheck(overload, (torch.randn(6, 70), torch.tensor([0, 5, 3])))
    torch.library.opcheck(overload, (torch.randn(6, 6).bfloat16().T, torch.tensor([1, 2])))


@backends
def test_threads_agree(backend):
    x = matrix(700, 900, torch.bfloat16)  # enough for every thread to get a share
    rows, columns = sorted_index(700, 350), sorted_index(900, 450)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check(backend, x, rows, columns)
    finally:
        torch.set_num_threads(before)


@backends
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 1, 40, 130])
def test_into_an_output(backend, dtype, kept):
    x = matrix(40, 130, dtype)
    rows, columns = torch.randint(0, 40, (kept,)), torch.randint(0, 130, (kept,))
    out_rows, frame_of_rows = framed(kept, 130, x)
    out_columns, frame_of_columns = framed(40, kept, x)
    with force_backend(backend):
        assert gather_rows(x, rows, out=out_rows) is out_rows
        assert gather_cols(x, columns, out_columns) is out_columns
    assert torch.equal(out_rows, picked(x, rows))
    assert torch.equal(out_columns, picked(x.T, columns).T)
    assert rim_untouched(frame_of_rows)
    assert rim_untouched(frame_of_columns)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
def test_in_place(backend, dtype, index_dtype, share):
    dense = matrix(211, 300, dtype)
    rows = sorted_index(211, int(211 * share)).to(index_dtype)
    columns = sorted_index(300, int(300 * share)).to(index_dtype)
    for compact, index, expected in (
        (compact_rows_, rows, picked(dense, rows)),
        (compact_cols_, columns, picked(dense.T, columns).T),
    ):
        x, frame = framed(211, 300, dense)
        x.copy_(dense)
        with force_backend(backend):
            result = compact(x, index)
        assert torch.equal(result, expected)
        assert result.data_ptr() == x.data_ptr() or result.numel() == 0
        assert rim_untouched(frame)


@backends
def test_in_place_first_and_last(backend):
    dense = matrix(70, 130, torch.float16)
    for index in (torch.arange(30), torch.arange(40, 70), torch.tensor([0, 69])):
        with force_backend(backend):
            assert torch.equal(compact_rows_(dense.clone(), index), picked(dense, index))
            assert torch.equal(compact_cols_(dense.clone(), index), picked(dense.T, index).T)


@backends
@pytest.mark.parametrize("with_up", [True, False])
def test_one_layer_at_once(backend, with_up):
    gate, up, down = (matrix(*shape, torch.bfloat16) for shape in ((96, 40), (96, 40), (40, 96)))
    for index in (sorted_index(96, 48), torch.randint(0, 96, (31,)), torch.arange(0)):
        with force_backend(backend):
            small = compact_mlp(gate, up if with_up else None, down.T.contiguous().T, index)
        assert torch.equal(small[0], picked(gate, index))
        assert torch.equal(small[1], picked(up, index)) if with_up else small[1] is None
        assert torch.equal(small[2], picked(down.T, index).T)
        assert all(part.is_contiguous() for part in small if part is not None)


@backends
@pytest.mark.parametrize("compact", [compact_rows_, compact_cols_])
@pytest.mark.parametrize("bad", [[0, 2, 1], [0, 1, 1]])
def test_in_place_needs_an_ascending_index(backend, compact, bad):
    x = matrix(9, 9, torch.float32)
    before = x.clone()
    with (
        force_backend(backend),
        pytest.raises(ValueError, match=rf"{compact.__name__}: index must ascend without repeats"),
    ):
        compact(x, torch.tensor(bad))
    assert torch.equal(x, before)


@pytest.mark.parametrize("compact", [compact_rows_, compact_cols_])
def test_in_place_wrong_arguments(compact):
    x, index = torch.ones(4, 6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"must be neighbours, got stride 6; where x is transp"):
        compact(x.T, index)
    with pytest.raises(ValueError, match="the rows of x must not overlap"):
        compact(x[:1].expand(4, 6), index)
    with pytest.raises(ValueError, match="index must ascend without repeats, got 9 of"):
        compact(x, torch.arange(9))
    with pytest.raises(IndexError):
        compact(x, torch.tensor([0, 9]))


def test_outputs_that_do_not_fit():
    x, index = torch.ones(4, 6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"gather_rows: out must be \[2, 6\] torch.float32 on cpu"):
        gather_rows(x, index, out=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"gather_cols: out must be \[4, 2\]"):
        gather_cols(x, index, out=torch.ones(4, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="elements of out's rows must be neighbours, got stride 4"):
        gather_cols(x, index, out=torch.ones(2, 4).T)


def test_layers_that_do_not_fit():
    gate, index = torch.ones(6, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"expected gate \[F, D\], up \[F, D\] and down \[D, F\]"):
        compact_mlp(gate, gate, gate, index)
    with pytest.raises(ValueError, match=r"expected torch\.float32 throughout, got torch.float16"):
        compact_mlp(gate, None, gate.T.half(), index)


def test_opcheck_of_what_writes():
    x, index = torch.randn(6, 70), torch.tensor([0, 3, 5])
    ops = torch.ops.prunekit
    kept_rows, kept_columns = torch.empty(3, 70), torch.empty(6, 3)
    torch.library.opcheck(ops.gather_rows_out.default, (x, index, kept_rows))
    torch.library.opcheck(ops.gather_cols_out.default, (x, index, kept_columns))
    torch.library.opcheck(ops.compact_rows_.default, (x.clone(), index))
    torch.library.opcheck(ops.compact_cols_.default, (x.clone(), index))
    down_out = torch.empty(70, 3)
    layer = (x, x + 1, x.T.contiguous(), index, kept_rows, torch.empty(3, 70), down_out)
    torch.library.opcheck(ops.compact_mlp_out.default, layer)
    layer = (x, None, x.T, index, kept_rows, None, down_out)
    torch.library.opcheck(ops.compact_mlp_out.default, layer)


@backends
def test_threads_agree_in_place(backend):
    dense = matrix(700, 900, torch.bfloat16)
    rows, columns = sorted_index(700, 350), sorted_index(900, 450)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with force_backend(backend):
                assert torch.equal(compact_rows_(dense.clone(), rows), dense[rows])
                assert torch.equal(compact_cols_(dense.clone(), columns), dense[:, columns])
    finally:
        torch.set_num_threads(before)
