"""gated_mlp is the formula, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F

from prunekit import ops


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
