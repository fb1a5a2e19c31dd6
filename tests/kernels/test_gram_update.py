"""The Gram matrix's triangle in Triton: its numbers, its tiles, and what it leaves alone."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from prunekit_kernels import launch, tuning
from prunekit_kernels.gram_update import _triangle_tile, gram_update_triton
from tests.kernels.device import DEVICE, DTYPES, INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)


def random_h(tokens, width, dtype):
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    return torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)


def check(gram, h):
    """Add hᵀh to gram, and hold the upper triangle against fp64."""
    exact = gram.double() + h.double().T @ h.double()
    wide = h.float()
    torch_error = (gram + wide.T @ wide - exact).triu().abs().max() if h.shape[1] else 0
    gram_update_triton(gram, h)
    if h.shape[1]:
        slack = torch.finfo(torch.float32).eps * exact.abs().max()  # another order of addition
        assert (gram.double() - exact).triu().abs().max() <= 2 * torch_error + slack


SHAPES = [(0, 20), (1, 1), (5, 0), (7, 16), (33, 37), (100, 130), (16, 161)]


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_update(dtype, tokens, width):
    gram = torch.randn(width, width).to(DEVICE)
    check(gram, random_h(tokens, width, dtype))


def test_batches_add_up():
    h = random_h(75, 37, torch.float32)
    gram, at_once = torch.zeros(2, 37, 37, device=DEVICE)
    for part in h.split((20, 1, 54)):
        gram_update_triton(gram, part)
    gram_update_triton(at_once, h)
    torch.testing.assert_close(gram.triu(), at_once.triu(), rtol=1e-5, atol=1e-5)


def test_rows_and_columns_with_gaps_between_them():
    padded = torch.full((33, 45), float("nan"), device=DEVICE)
    padded[:, 1:-2] = random_h(33, 42, torch.float32)
    check(torch.zeros(42, 42, device=DEVICE), padded[:, 1:-2])
    check(torch.zeros(21, 21, device=DEVICE), padded[:, 1:-2:2])


@pytest.mark.skipif(not INTERPRETED, reason="takes tiles as small as the interpreter's")
def test_tiles_below_the_diagonal_are_not_touched():
    gram = torch.zeros(48, 48, device=DEVICE)
    gram_update_triton(gram, random_h(5, 48, torch.float32))
    blocks = gram.view(3, 16, 3, 16).abs().sum((1, 3)) > 0
    assert torch.equal(blocks, torch.ones_like(blocks).triu())


def test_same_bits_every_run():
    h = random_h(100, 50, torch.float32)
    grams = torch.zeros(2, 50, 50, device=DEVICE)
    for gram in grams:
        gram_update_triton(gram, h)
    assert torch.equal(*grams)


def test_nan_reaches_its_row_and_column_alone():
    h = random_h(20, 37, torch.float16)
    h[9, 5] = float("nan")
    gram = torch.zeros(37, 37, device=DEVICE)
    gram_update_triton(gram, h)
    expected = torch.zeros(37, 37, dtype=torch.bool)
    expected[5, :] = expected[:, 5] = True
    assert torch.equal(gram.isnan().cpu().triu(), expected.triu())


@triton.jit
def _tiles_kernel(out, blocks, BAND: tl.constexpr):
    row, column = _triangle_tile(tl.program_id(0), blocks, BAND)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("band", [1, 3, 12])
@pytest.mark.parametrize("blocks", [1, 2, 7, 25])
def test_every_tile_of_the_triangle_has_one_owner(blocks, band):
    count = blocks * (blocks + 1) // 2
    tiles = torch.full((count, 2), -1, dtype=torch.int32, device=DEVICE)
    _tiles_kernel[(count,)](tiles, blocks, BAND=band)
    pairs = [(row, column) for row in range(blocks) for column in range(row, blocks)]
    assert sorted(map(tuple, tiles.tolist())) == pairs


@triton.jit
def _tile_kernel(out, number, blocks, BAND: tl.constexpr):
    row, column = _triangle_tile(number, blocks, BAND)
    tl.store(out, row)
    tl.store(out + 1, column)


def test_the_tile_is_right_where_fp32_can_not_count():
    """With one column a band the tiles go column by column."""
    for column in (4095, 5792, 8191, 20000):
        for row in (0, column):
            tile = torch.zeros(2, dtype=torch.int32, device=DEVICE)
            number = column * (column + 1) // 2 + row
            _tile_kernel[(1,)](tile, number, 20001, BAND=1)
            assert tile.tolist() == [row, column]


def test_only_the_triangle_is_launched():
    with launch.recorded("sm_90") as launches:
        h = torch.empty(512, 8960, dtype=torch.bfloat16, device="meta")
        gram_update_triton(torch.empty(8960, 8960, device="meta"), h)
    assert launches[0].grid == (70 * 71 // 2,)


def test_rows_that_are_not_aligned_get_tiles_that_do_not_spill():
    blocks = []
    for width in (8960, 8961):
        with launch.recorded("sm_90") as launches:
            h = torch.empty(512, width, dtype=torch.bfloat16, device="meta")
            gram_update_triton(torch.empty(width, width, device="meta"), h)
        blocks.append(launches[0].arguments["BLOCK_F"])
    assert blocks == [128, 64]


def test_a_measured_configuration_serves():
    config = {"BLOCK_F": 32, "BLOCK_T": 16, "BAND": 2, "num_warps": 4, "num_stages": 2}
    with tuning.trying("gram_update", config):
        check(torch.zeros(130, 130, device=DEVICE), random_h(33, 130, torch.float32))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_unsupported_dtype(dtypes):
    gram, h = torch.zeros(4, 4, dtype=dtypes[0]), torch.zeros(3, 4, dtype=dtypes[1])
    with pytest.raises(ValueError, match=f"got {dtypes[0]} and {dtypes[1]}; convert them"):
        gram_update_triton(gram, h)
