"""gated_act_stats against an fp64 computation, on every backend, dtype, activation and shape."""

import itertools

import pytest
import torch

from prunekit.ops import ACTIVATIONS, force_backend, gated_act_stats
from prunekit.ops.backends import EXTENSION_PROBLEM

needs_cpp = pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
activations = pytest.mark.parametrize("act", list(ACTIVATIONS))
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)

# (T, F): one element, less than a vector, odd, around a tile of 64 and a panel of 512 columns.
SHAPES = [(1, 1), (3, 5), (33, 64), (65, 63), (40, 65), (100, 577), (7, 1100)]


def inputs(tokens, width, dtype):
    x = torch.randn(2, tokens, width)
    return (x[0] * 3).to(dtype), x[1].to(dtype)


def some_spans(tokens):
    """Padding before, between and after; a span of one token and an empty one where they fit."""
    edges = sorted({0, tokens // 7, tokens // 7 + 1, tokens // 2, tokens - tokens // 5})
    spans = [[a, b] for a, b in itertools.pairwise(edges) if a != tokens // 2]
    return torch.tensor([*spans, [tokens, tokens]], dtype=torch.int64)


def exact(gate, up, act):
    """h in fp64, from the inputs as they are."""
    h = ACTIVATIONS[act](gate.double())
    return h if up is None else h * up.double()


def exact_stats(gate, h, spans):
    """The statistics of a given h, in fp64."""
    wide, counted = h.double(), torch.zeros(h.shape[0], dtype=torch.bool)
    prompt_stats = torch.zeros(2, len(spans), h.shape[1], dtype=torch.float64)
    for p, (start, end) in enumerate(spans.tolist()):
        prompt_stats[0, p] = wide[start:end].abs().sum(0)
        prompt_stats[1, p] = wide[start:end].square().sum(0)
        counted[start:end] = True
    rows = wide[counted]
    if not len(rows):
        return prompt_stats, wide.new_zeros(3, h.shape[1])
    active = (gate[counted] > 0).sum(0).double()
    return prompt_stats, torch.stack([rows.sum(0), rows.abs().amax(0), active])


def check_stats(gate, h, spans, prompt_stats, token_stats):
    """Sums to fp32's last bits of the sum of magnitudes; maximum and count exactly."""
    exact_prompts, exact_tokens = exact_stats(gate, h, spans)
    tolerance = 1e-6  # and 1e-30, for sums that fp32 can hardly hold
    assert prompt_stats.dtype == token_stats.dtype == torch.float32
    torch.testing.assert_close(prompt_stats.double(), exact_prompts, rtol=tolerance, atol=1e-30)
    error = (token_stats[0].double() - exact_tokens[0]).abs()
    assert (error <= tolerance * exact_prompts[0].sum(0) + 1e-30).all()
    assert torch.equal(token_stats[1:], exact_tokens[1:].float())


@backends
@dtypes
@activations
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(backend, dtype, act, shape):
    gate, up = inputs(*shape, dtype)
    spans = some_spans(shape[0])
    for factor in (up, None):
        with force_backend(backend):
            h, prompt_stats, token_stats = gated_act_stats(gate, factor, spans, act)
        assert h.dtype == dtype
        assert h.is_contiguous()
        check_stats(gate, h, spans, prompt_stats, token_stats)

        # No worse than twice what torch makes of it in the same dtype, which rounds in between.
        expected = exact(gate, factor, act)
        plain = ACTIVATIONS[act](gate) if factor is None else ACTIVATIONS[act](gate) * factor
        epsilon = torch.finfo(dtype).eps
        allowed = 2 * (plain.double() - expected).abs() + epsilon * expected.abs() + 1e-7 * epsilon
        allowed += 2e-7 * gate.double().abs() * (1 if factor is None else factor.double().abs())
        if dtype == torch.float64:
            allowed = 1e-15 * (1 + expected.abs())
        assert ((h.double() - expected).abs() <= allowed).all()


@needs_cpp
@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_half_precision_gate(act, dtype):
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite()][None]
    h, _, _ = gated_act_stats(gate, None, torch.empty(0, 2, dtype=torch.int64), act)
    expected = exact(gate, None, act)
    in_dtype, largest = expected.to(dtype).double(), torch.finfo(dtype).max
    fits = in_dtype.abs() < largest
    assert not h.isnan().any()
    # Half a last place of rounding, and the fp32 arithmetic before it.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = 0.51 * torch.finfo(dtype).eps * expected.abs() + 2e-7 * gate.double().abs() + tiny
    error = (h.double() - expected).abs()
    assert (error[fits] <= allowed[fits]).all()


@backends
@dtypes
def test_slices_of_a_fused_projection(backend, dtype):
    fused = inputs(50, 300, dtype)[0]
    gate, up = fused[:, :147], fused[:, 150:297]
    spans = torch.tensor([[2, 20], [20, 49]])
    with force_backend(backend):
        strided = gated_act_stats(gate, up, spans, "silu")
        dense = gated_act_stats(gate.contiguous(), up.contiguous(), spans, "silu")
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    check_stats(gate, strided[0], spans, *strided[1:])


@backends
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (5, 70)])
def test_nothing_counted(backend, shape):
    gate, up = inputs(*shape, torch.bfloat16)
    spans = torch.empty(0, 2, dtype=torch.int64)
    with force_backend(backend):
        h, prompt_stats, token_stats = gated_act_stats(gate, up, spans, "silu")
    assert h.shape == shape
    assert prompt_stats.shape == (2, 0, shape[1])
    assert torch.equal(token_stats, torch.zeros(3, shape[1]))


@backends
@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nan_shows_and_stays_in_its_column(backend, act, dtype):
    gate, up = inputs(70, 130, dtype)
    gate[3, 7] = up[50, 129] = float("nan")
    with force_backend(backend):
        h, prompt_stats, token_stats = gated_act_stats(gate, up, torch.tensor([[0, 70]]), act)
    bad = torch.zeros(130, dtype=torch.bool)
    bad[7] = bad[129] = True
    assert torch.equal(h.isnan().nonzero(), torch.tensor([[3, 7], [50, 129]]))
    assert torch.equal(prompt_stats[:, 0].isnan(), bad.expand(2, -1))
    assert torch.equal(token_stats[:2].isnan(), bad.expand(2, -1))


@needs_cpp
def test_extreme_gates_saturate():
    gate = torch.tensor([[-1e4, -3e38, 1e4, float("inf"), -0.0, 88.8, -88.8]])
    spans = torch.tensor([[0, 1]])
    for act in ("silu", "gelu", "gelu_tanh"):
        h = gated_act_stats(gate, None, spans, act)[0]
        assert torch.equal(h[0, :5], torch.tensor([0, 0, 1e4, float("inf"), 0])), act
        assert h[0, 5] == gate[0, 5]
        assert -1e-36 < h[0, 6] <= 0


@needs_cpp
@dtypes
def test_threads_do_not_change_a_bit(dtype):
    gate, up = inputs(300, 1001, dtype)
    spans = torch.tensor([[0, 130], [140, 300]])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(gated_act_stats(gate, up, spans, "silu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize(
    "spans", [[[2, 1]], [[0, 3], [2, 4]], [[0, 11]], [[-1, 2]], [[5, 6], [0, 1]]], ids=str
)
def test_bad_spans(spans):
    gate, up = inputs(10, 8, torch.float32)
    for op, act in ((gated_act_stats, "silu"), (torch.ops.prunekit.gated_act_stats, 0)):
        with pytest.raises(ValueError, match=r"spans must ascend without overlap within \[0, 10\]"):
            op(gate, up, torch.tensor(spans), act)


def test_bad_arguments():
    gate, spans = torch.ones(4, 6), torch.tensor([[0, 4]])
    with pytest.raises(ValueError, match="activation: got 'swish'"):
        gated_act_stats(gate, None, spans, "swish")
    with pytest.raises(ValueError, match="up must match gate"):
        gated_act_stats(gate, torch.ones(4, 5), spans, "silu")
    with pytest.raises(ValueError, match="unit stride"):
        gated_act_stats(gate.T, None, spans, "silu")
    with pytest.raises(ValueError, match=r"spans must be \[P, 2\] int64"):
        gated_act_stats(gate, None, spans.int(), "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype):
    gate, up = inputs(9, 70, dtype)
    spans = torch.tensor([[0, 4], [5, 9]])
    for factor in (up, None):
        torch.library.opcheck(torch.ops.prunekit.gated_act_stats.default, (gate, factor, spans, 0))
