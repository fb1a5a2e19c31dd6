"""The backward of the gated MLP in Triton, against torch's autograd in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from prunekit.ops.activations import NAMES
from prunekit.ops.gated_mlp import gated_mlp_ref
from prunekit_kernels import launch
from prunekit_kernels.gated_mlp_backward import gated_mlp_backward
from tests.kernels.device import DEVICE, DTYPES, INTERPRETED

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a GPU",
    ),
    # exp(-x) of a very negative x is infinite, and 1 over it the right zero; numpy remarks on it.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

ALL = (True,) * 7
LEAVES = ("x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill what new_empty returns with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(tokens, hidden, width, dtype, *, with_up=True, biases=True):
    """Return grad_y and the seven tensors of the forward, h of a size around 1."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + hidden * 100 + width)

    def random(*shape, scale=1.0):
        return torch.randn(shape, generator=generator).mul(scale).to(DEVICE, dtype)

    root = max(hidden, 1) ** -0.5
    tensors = [
        random(tokens, hidden),
        random(width, hidden, scale=root),
        random(width, hidden, scale=root) if with_up else None,
        random(hidden, width, scale=max(width, 1) ** -0.5),
        random(width) if biases else None,
        random(width) if biases and with_up else None,
        random(hidden) if biases else None,
    ]
    return random(tokens, hidden), tensors


def autograd(grad_y, tensors, act, dtype):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    given = [t for t in leaves if t is not None]
    y = gated_mlp_ref(*leaves, act)
    found = iter(torch.autograd.grad(y, given, grad_y.to(dtype)))
    return [None if t is None else next(found) for t in leaves]


def backward(grad_y, tensors, act, needed=ALL):
    return gated_mlp_backward(grad_y, *tensors[:6], act, needed)


def check(grad_y, tensors, act, needed=None):
    """Hold every gradient to twice the error of torch's in the same dtype."""
    needed = tuple(t is not None for t in tensors) if needed is None else needed
    found = backward(grad_y, tensors, act, needed)
    exact = autograd(grad_y, tensors, act, torch.float64)
    torchs = autograd(grad_y, tensors, act, grad_y.dtype)
    for name, need, grad, right, other in zip(LEAVES, needed, found, exact, torchs, strict=True):
        if not need or right is None:
            assert grad is None, name
            continue
        assert grad.dtype == grad_y.dtype, name
        assert grad.is_contiguous(), name
        assert grad.shape == right.shape, name
        if grad.numel():
            torch_error = (other.double() - right).abs().max()
            slack = 1e-6 * right.abs().max()
            assert (grad.double() - right).abs().max() <= 2 * torch_error + slack, name


SHAPES = [
    (1, 1, 1),
    (3, 37, 70),
    (33, 40, 65),  # every dimension one past a block or short of one
    (64, 32, 96),  # whole blocks only
    (300, 17, 40),  # more than one row of tiles in a group, and two owners of a column's sum
]


@pytest.mark.parametrize(("tokens", "hidden", "width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_mlp_backward(dtype, tokens, hidden, width):
    check(*random_inputs(tokens, hidden, width, dtype), NAMES.index("silu"))


@pytest.mark.parametrize("with_up", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, act, with_up):
    inputs = random_inputs(35, 40, 37, dtype, with_up=with_up, biases=with_up)
    check(*inputs, NAMES.index(act))


NEEDED = {
    "x": (True, False, False, False, False, False, False),
    "gate": (False, True, False, False, False, False, False),
    "up": (False, False, True, False, False, False, False),
    "down": (False, False, False, True, False, False, False),
    "biases": (False, False, False, False, True, True, True),
    "down_bias": (False, False, False, False, False, False, True),
    "none": (False,) * 7,
}


@pytest.mark.parametrize("needed", NEEDED.values(), ids=NEEDED)
def test_only_what_is_needed(needed):
    check(*random_inputs(17, 33, 40, torch.float32), NAMES.index("gelu"), needed)


def test_absent_tensors_have_no_gradient():
    grad_y, tensors = random_inputs(5, 8, 9, torch.float32, with_up=False, biases=False)
    found = backward(grad_y, tensors, 0)
    assert [g is None for g in found] == [False, False, True, False, True, True, False]


def test_no_tokens_give_zeros():
    grad_y, tensors = random_inputs(0, 33, 40, torch.float16)
    grad_x, *others = backward(grad_y, tensors, 0)
    assert grad_x.shape == (0, 33)
    assert all(
        torch.equal(g, torch.zeros_like(t)) for g, t in zip(others, tensors[1:], strict=True)
    )


def test_no_neurons():
    grad_y, tensors = random_inputs(5, 33, 0, torch.float32)
    found = backward(grad_y, tensors, 0)
    assert torch.equal(found[0], torch.zeros_like(grad_y))
    assert [tuple(g.shape) for g in found[1:6]] == [(0, 33), (0, 33), (33, 0), (0,), (0,)]
    torch.testing.assert_close(found[6], grad_y.sum(0))


def test_halves_of_fused_tensors():
    """Weights that share a projection, and rows of x and grad_y that lie apart."""
    grad_y, tensors = random_inputs(35, 40, 36, torch.float32)
    fused = torch.cat([tensors[1], tensors[2]], 1)
    tensors[1], tensors[2] = fused.chunk(2, 1)
    tensors[3] = torch.cat([tensors[3], tensors[3]], 1)[:, 36:]
    rows = torch.cat([tensors[0], grad_y], 1)
    tensors[0], grad_y = rows.chunk(2, 1)
    assert not any(t.is_contiguous() for t in (grad_y, *tensors[:4]))
    check(grad_y, tensors, 0)


def test_the_gradient_of_a_sum_is_one_number_expanded():
    _, tensors = random_inputs(9, 16, 20, torch.float32)
    check(torch.ones((), device=DEVICE).expand(9, 16), tensors, 0)


def test_same_bits_every_run():
    inputs = random_inputs(200, 40, 37, torch.float16)
    first, second = (backward(*inputs, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("act", NAMES)
def test_nan_in_a_row_of_x_reaches_what_depends_on_it(act):
    grad_y, tensors = random_inputs(40, 20, 36, torch.float16)
    tensors[0][35, 3] = float("nan")
    found = backward(grad_y, tensors, NAMES.index(act))
    assert found[0].isnan().any(1).nonzero().flatten().tolist() == [35]
    assert all(found[i].isnan().all() for i in range(1, 6))
    assert not found[6].isnan().any()


def test_nan_in_grad_y():
    grad_y, tensors = random_inputs(40, 20, 36, torch.float16)
    grad_y[35, 3] = float("nan")
    found = backward(grad_y, tensors, 0)
    assert found[0].isnan().any(1).nonzero().flatten().tolist() == [35]
    assert found[3].isnan().any(1).nonzero().flatten().tolist() == [3]
    assert found[6].isnan().nonzero().flatten().tolist() == [3]


def test_unsupported_dtype():
    grad_y, tensors = random_inputs(3, 4, 5, torch.float64)
    with pytest.raises(ValueError, match=r"take bfloat16, float16 or float32, got torch\.float64"):
        backward(grad_y, tensors, 0)


@pytest.mark.parametrize(
    ("needed", "kernels"),
    [
        (ALL, ["backward_hidden", "grad_x"] + ["grad_weight"] * 3 + ["column_sums"] * 6),
        (NEEDED["down"], ["backward_hidden", "grad_weight"]),
        (NEEDED["down_bias"], ["column_sums"] * 2),
        (NEEDED["none"], []),
    ],
)
def test_launches_only_what_is_needed(needed, kernels):
    grad_y, tensors = random_inputs(33, 40, 36, torch.float32)
    with launch.recorded("sm_90") as launches:
        backward(grad_y.to("meta"), [t.to("meta") for t in tensors], 0, needed)
    assert [one.name for one in launches] == kernels
