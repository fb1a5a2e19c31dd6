"""The public operations over Triton: the dispatcher's way, leading axes, gradients, refusals."""

import pytest
import torch

import prunekit as pk
from prunekit import ops
from prunekit.ops import backends
from tests.kernels.device import DEVICE
from tests.models import tiny_model
from tests.ops.test_gated_mlp import weights

pytestmark = [
    pytest.mark.skipif(backends.TRITON_PROBLEM is not None, reason=str(backends.TRITON_PROBLEM)),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
SILU = ops.activation_code("silu")


def parts_for(hidden=24, width=40, **options):
    parts = weights(hidden, width, dtype=torch.float32, **options)
    return [None if t is None else t.div(t.shape[-1] ** 0.5).to(DEVICE) for t in parts]


def named(biases):
    return dict(zip(("gate_bias", "up_bias", "down_bias"), biases, strict=True))


@pytest.fixture
def triton():
    with ops.force_backend("triton"):
        yield


@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 24), (2, 3, 24), (3, 11, 24)])
def test_gated_mlp_for_any_leading_axes(triton, shape):
    gate, up, down, *biases = parts_for()
    x = torch.randn(shape, device=DEVICE)
    got = ops.gated_mlp(x, gate, up, down, **named(biases))
    assert got.shape == x.shape
    torch.testing.assert_close(
        got, ops.gated_mlp_ref(x, gate, up, down, *biases, SILU), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("gated", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("tokens", [3, 20])
def test_gradients_of_all_that_want_one(triton, tokens, gated, bias):
    parts = parts_for(gated=gated, bias=bias)
    leaves = [torch.randn(2, tokens, 24, device=DEVICE), *parts]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    x, gate, up, down, *biases = leaves
    wanted = [t for t in leaves if t is not None]
    y = ops.gated_mlp(x, gate, up, down, **named(biases), act="gelu_tanh")
    got = torch.autograd.grad(y.sum(), wanted)  # a broadcast gradient, of stride 0
    code = ops.activation_code("gelu_tanh")
    want = torch.autograd.grad(ops.gated_mlp_ref(*leaves, code).sum(), wanted)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_weights_cost_no_gradient(triton):
    gate, up, down, *_ = parts_for(bias=False)
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    ops.gated_mlp(x, gate, up, down).square().sum().backward()
    assert x.grad is not None
    assert gate.grad is None


@pytest.mark.parametrize("tokens", [5, 15])
def test_gated_mlp_indexed(triton, tokens):
    gate, up, down, *biases = parts_for()
    index = torch.tensor([0, 3, 4, 39], dtype=torch.int32, device=DEVICE)
    x = torch.randn(2, tokens, 24, device=DEVICE)
    got = ops.gated_mlp_indexed(x, gate, up, down, index, **named(biases))
    want = ops.gated_mlp_indexed_ref(x, gate, up, down, index, *biases, SILU)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gated_mlp_stats(triton):
    gate, up, down, *biases = parts_for()
    spans = torch.tensor([[0, 7], [9, 20]])
    x = torch.randn(23, 24, device=DEVICE)
    got = ops.gated_mlp_stats(x, gate, up, down, spans, **named(biases))
    want = ops.gated_mlp_stats_ref(x, gate, up, down, *biases, spans, SILU)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gram_update_adds_to_the_triangle(triton):
    h = torch.randn(30, 50, device=DEVICE)
    gram = torch.ones(50, 50, device=DEVICE)
    ops.gram_update(gram, h)
    torch.testing.assert_close(ops.symmetrize_(gram), 1 + h.T @ h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_a_compact_model_runs_compiles_and_trains(triton, name):
    model = pk.compact_modules(tiny_model(name)).to(DEVICE).eval()
    ids = torch.arange(20, device=DEVICE)[None]
    with ops.force_backend("reference"):
        want = model(ids).logits
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-3, atol=1e-4)
    mlp = next(m for m in model.modules() if isinstance(m, pk.CompactMLP))
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 20, 32, device=DEVICE, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, mlp(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())


def test_calibration_takes_its_statistics_from_the_fused_kernel(tokenizer, texts):
    plain = pk.calibrate(tiny_model("llama").to(DEVICE), tokenizer, texts[:8], gram=True)
    with ops.force_backend("triton"):
        fused = pk.calibrate(tiny_model("llama").to(DEVICE), tokenizer, texts[:8], gram=True)
    for a, b in zip(fused.target, plain.target, strict=True):
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.token_square_sum, b.token_square_sum, rtol=1e-4, atol=1e-7)


def test_what_the_kernels_cannot_take_goes_to_torch_or_is_refused_where_forced():
    from prunekit.ops import gpu

    gate, up, down, *biases = (t.double() for t in parts_for())
    x = torch.randn(3, 24, device=DEVICE, dtype=torch.float64)
    got = gpu.gated_mlp(x, gate, up, down, *biases, SILU)
    assert torch.equal(got, ops.gated_mlp_ref(x, gate, up, down, *biases, SILU))
    with ops.force_backend("triton"):
        with pytest.raises(ops.BackendError, match=r"gated_mlp: .* float16, float32; got float64"):
            ops.gated_mlp(x, gate, up, down, **named(biases))
        with pytest.raises(ops.BackendError, match="expected unit stride along the last axis"):
            ops.gated_mlp(x.float(), gate.float(), up.float(), down.float().T.contiguous().T)
        with pytest.raises(ops.BackendError, match=r"expected an fp32 gram, got torch\.float64"):
            ops.gram_update(torch.zeros(24, 24, dtype=torch.float64, device=DEVICE), x)
