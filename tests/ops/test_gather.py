"""gather_rows and gather_cols: exact, on every backend, for every layout, element and index."""

import pytest
import torch

from prunekit.ops import force_backend, gather_cols, gather_rows
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
