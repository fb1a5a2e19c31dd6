"""gated_mlp is the formula, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F

from prunekit import ops
from prunekit.ops.backends import EXTENSION_PROBLEM
from prunekit.ops.gated_mlp_cpu import DECODE_TOKENS
from prunekit.ops.isa import cpu_isa

needs_extension = pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))


def weights(hidden, width, *, gated=True, bias=True, dtype=torch.float64, grad=False):
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    gate, up, down = (torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes)
    biases = [torch.randn(n, dtype=dtype, requires_grad=grad) for n in (width, width, hidden)]
    gate_bias, up_bias, down_bias = biases if bias else (None, None, None)
    if not gated:
        up = up_bias = None
    return gate, up, down, gate_bias, up_bias, down_bias


@pytest.mark.parametrize("act", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (0, 7), (1, 7), (2, 5, 7)])
def test_gated_mlp(act, gated, bias, shape):
    gate, up, down, gate_bias, up_bias, down_bias = weights(7, 13, gated=gated, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    h = ops.ACTIVATIONS[act](F.linear(x, gate, gate_bias))
    if up is not None:
        h = h * F.linear(x, up, up_bias)
    got = ops.gated_mlp(
        x, gate, up, down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias, act=act
    )
    torch.testing.assert_close(got, F.linear(h, down, down_bias))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize(("gated", "bias"), [(True, True), (True, False), (False, True)])
def test_gradients(act, gated, bias):
    gate, up, down, *biases = weights(3, 4, gated=gated, bias=bias, grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(*tensors):
        return torch.ops.prunekit.gated_mlp(*tensors, ops.activation_code(act))

    assert torch.autograd.gradcheck(run, (x, gate, up, down, *biases))


def test_frozen_weights_get_no_gradient():
    gate, up, down, *_ = weights(3, 4, bias=False)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ops.gated_mlp(x, gate, up, down).sum().backward()
    assert x.grad is not None
    assert gate.grad is None


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(gated):
    gate, up, down, *biases = weights(3, 4, gated=gated, dtype=torch.float32, grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.prunekit.gated_mlp.default, (x, gate, up, down, *biases, 0))


def test_wrong_arguments():
    gate, up, down, *_ = weights(3, 4)
    with pytest.raises(ValueError, match=r"does not fit gate \(4, 3\)"):
        ops.gated_mlp(torch.randn(2, 5), gate, up, down)
    with pytest.raises(ValueError, match="got 'swish'; expected one of silu, gelu, gelu_tanh"):
        ops.gated_mlp(torch.randn(2, 3), gate, up, down, act="swish")


def decode(x, parts, act):
    """What the C++ kernel gives, with no fallback."""
    return torch.ops.prunekit.gated_mlp_decode(x, *parts, ops.activation_code(act))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 16])
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (7, 3), (33, 130), (96, 256)])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_decode_is_at_most_twice_as_far_from_fp64_as_torch(
    dtype, tokens, hidden, width, gated, bias
):
    exact = weights(hidden, width, gated=gated, bias=bias)
    exact = [None if w is None else (w / w.shape[-1] ** 0.5) for w in exact]
    parts = [None if w is None else w.to(dtype) for w in exact]
    x = torch.randn(tokens, hidden).to(dtype)
    code = ops.activation_code("silu")
    wide = [None if w is None else w.double() for w in parts]
    want = ops.gated_mlp_ref(x.double(), *wide, code)
    theirs = (ops.gated_mlp_ref(x, *parts, code).double() - want).abs()
    ours = (decode(x, parts, "silu").double() - want).abs()
    if tokens:
        # A sum of products may round by the dtype's eps times the sum of their absolute values.
        gate, up, down, gate_bias, up_bias, _ = wide
        identity = torch.eye(width, dtype=torch.float64)
        h = ops.gated_mlp_ref(x.double(), gate, up, identity, gate_bias, up_bias, None, code)
        rounding = torch.finfo(dtype).eps * (h.abs() @ down.abs().T).max()
        assert ours.max() <= 2 * max(theirs.max(), rounding)


@needs_extension
@pytest.mark.parametrize("act", list(ops.ACTIVATIONS))
def test_decode_knows_every_activation(act):
    parts = weights(40, 70, dtype=torch.float32)
    x = torch.randn(3, 40)
    want = ops.gated_mlp_ref(x, *parts, ops.activation_code(act))
    torch.testing.assert_close(decode(x, parts, act), want, rtol=1e-4, atol=1e-3)


@needs_extension
@pytest.mark.parametrize("act", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("tokens", [1, 4, 7, 16])
@pytest.mark.parametrize(("hidden", "width"), [(96, 256), (576, 768)])
def test_decode_errs_in_bf16_no_more_than_torch(act, tokens, hidden, width):
    parts = [w / w.shape[-1] ** 0.5 for w in weights(hidden, width, bias=False)[:3]]
    parts = [*(w.bfloat16() for w in parts), None, None, None]
    x = torch.randn(tokens, hidden).bfloat16()
    code = ops.activation_code(act)
    wide = [None if w is None else w.double() for w in parts]
    want = ops.gated_mlp_ref(x.double(), *wide, code)
    theirs = (ops.gated_mlp_ref(x, *parts, code).double() - want).square().mean().sqrt()
    ours = (decode(x, parts, act).double() - want).square().mean().sqrt()
    assert ours <= theirs  # h is rounded once, not after each of its steps


@needs_extension
@pytest.mark.skipif(cpu_isa() not in DECODE_TOKENS, reason="torch serves on this instruction set")
def test_decode_serves_few_tokens_of_any_shape_and_gives_the_same_bits_on_any_threads():
    parts = [None if w is None else w.bfloat16() for w in weights(64, 200, bias=False)]
    gate, up = torch.cat(parts[:2]).chunk(2)  # as in a fused projection: rows of one matrix
    x = torch.randn(2, 1, 64).bfloat16()
    direct = decode(x.view(2, 64), [gate, up, *parts[2:]], "silu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.set_grad_enabled(threads == 1):  # through autograd's dispatch, and without
                got = ops.gated_mlp(x, gate, up, parts[2], act="silu")
            assert torch.equal(got, direct.view(2, 1, 64))
    finally:
        torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("place", ["x", "gate", "up", "down"])
@pytest.mark.parametrize("tokens", [3, 6])
def test_decode_lets_nan_through(dtype, place, tokens):
    gate, up, down, *_ = (None if w is None else w.to(dtype) for w in weights(33, 70, bias=False))
    x = torch.randn(tokens, 33).to(dtype)
    where = {"x": x[1], "gate": gate[69], "up": up[5], "down": down[32]}[place]
    where[-1] = float("nan")
    seen = decode(x, [gate, up, down, None, None, None], "silu").isnan()
    want = torch.zeros_like(seen)
    want[{"x": (1,), "down": (slice(None), 32)}.get(place, ())] = True
    assert torch.equal(seen, want)


@needs_extension
def test_decode_refuses_what_it_cannot_serve():
    parts = weights(4, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"contiguous \[..., D\] on the CPU, of up to 16 tokens"):
        decode(torch.randn(17, 4), parts, "silu")
    with pytest.raises(ValueError, match="dtype must be bf16, fp16 or fp32"):
        decode(torch.randn(2, 4).double(), parts, "silu")
    with pytest.raises(ValueError, match=r"down must be \[4, 6\] of x's dtype"):
        decode(torch.randn(2, 4), [*parts[:2], parts[2].T, *parts[3:]], "silu")
