"""gram_update adds HᵀH to the upper triangle, in the precision of its sums."""

import pytest
import torch

from prunekit import ops

SHAPES = [(0, 5), (1, 1), (7, 3), (33, 130), (64, 512), (40, 700)]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_gram_update(backend, dtype, tokens, width):
    h = torch.randn(tokens, width).to(dtype)
    before = torch.randn(width, width, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gram = before.to(wide, copy=True)
    with ops.force_backend(backend):
        ops.gram_update(gram, h)
    want = (before.to(wide).double() + h.double().T @ h.double()).triu()
    # bf16 values multiply exactly in fp32, so only the sums round: as many roundings as tokens.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert (gram.double().triu() - want).abs().max() <= tolerance * max(tokens, 4)


def test_products_of_other_code_keep_their_precision():
    before = torch.backends.mkldnn.matmul.fp32_precision
    ops.gram_update(torch.zeros(4, 4), torch.randn(3, 4).bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_symmetrize_mirrors_the_upper_triangle():
    gram = torch.rand(9, 9)
    upper = gram.triu()
    assert ops.symmetrize_(gram) is gram
    assert torch.equal(gram.triu(), upper)
    assert torch.equal(gram, gram.T)


def test_opcheck():
    args = torch.zeros(6, 6), torch.randn(4, 6)
    torch.library.opcheck(torch.ops.prunekit.gram_update.default, args)


@pytest.mark.parametrize(
    ("gram", "h", "message"),
    [
        (torch.zeros(4, 5), torch.zeros(3, 4), r"contiguous \[F, F\] for h \[T, F\], got \(4, 5\)"),
        (torch.zeros(4, 4).half(), torch.zeros(3, 4), "must be fp32 or fp64, got torch.float16"),
        (torch.zeros(4, 4), torch.zeros(2, 3, 4), "gram_update: gram must be"),
    ],
)
def test_wrong_arguments(gram, h, message):
    with pytest.raises(ValueError, match=message):
        ops.gram_update(gram, h)
