"""Decoding through an index, in Triton: its numbers and its loads in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from prunekit.ops.activations import NAMES
from prunekit.ops.gated_mlp import gated_mlp_ref
from prunekit_kernels.gated_mlp_decode import gated_mlp_decode
from tests.kernels import test_gated_mlp_decode as decode
from tests.kernels.device import DEVICE, DTYPES, INTERPRETED
from tests.kernels.test_gated_mlp_decode import metered, random_mlp

pytestmark = decode.pytestmark
_poisoned_outputs = decode._poisoned_outputs


def compacted(inputs, index):
    """The same MLP with the named neurons' weights copied together."""
    x, gate, up, down, gate_bias, up_bias, down_bias = inputs
    rows = [None if t is None else t[index.long()] for t in (gate, up, gate_bias, up_bias)]
    return [x, *rows[:2], down[:, index.long()].contiguous(), *rows[2:], down_bias]


def through(index, inputs, act=0):
    return gated_mlp_decode(*inputs, act, index)


def check(inputs, index, act=0):
    """Hold y's error to twice that of torch's own products with the compact weights."""
    decode.check_against_exact(through(index, inputs, act), compacted(inputs, index), act)


def some_of(width, kept, dtype=torch.int32):
    """An index in no order, as a nested checkpoint has it, the last neuron among it."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    order = torch.cat([order[order == width - 1], order[order != width - 1]])
    return order[:kept].to(DEVICE, dtype)


SHAPES = [  # tokens, hidden, width, kept: the interpreter's blocks are 16 rows, its steps 64
    (0, 5, 7, 3),
    (1, 1, 1, 1),
    (1, 33, 400, 301),  # two splits
    (7, 70, 50, 37),
    (16, 20, 64, 64),
    (16, 130, 75, 40),
    (3, 20, 9, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_mlp_indexed(dtype, shape):
    *sizes, kept = shape
    check(random_mlp(*sizes, dtype), some_of(sizes[-1], kept))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_index_types(dtype):
    index = torch.tensor([4, 0, 49, 7], dtype=dtype, device=DEVICE)
    check(random_mlp(3, 20, 50, torch.float16), index)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("with_up", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", NAMES)
def test_activations(act, with_up, with_bias):
    inputs = random_mlp(5, 40, 50, torch.float16, with_up=with_up, with_bias=with_bias)
    check(inputs, some_of(50, 20), NAMES.index(act))


def test_rows_with_gaps_between_them():
    inputs = random_mlp(5, 33, 41, torch.float32)
    for i in (0, 1, 2, 3):
        padded = torch.full((inputs[i].shape[0], inputs[i].shape[1] + 3), float("nan"))
        padded[:, 1:-2] = inputs[i]
        inputs[i] = padded.to(DEVICE)[:, 1:-2]  # what lies in the gaps would make y NaN
    check(inputs, some_of(41, 30))


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads")
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_named_row_and_all_of_down_are_loaded_once(tokens):
    inputs = random_mlp(tokens, 40, 400, torch.float16)
    index = some_of(400, 301, torch.int64)
    with metered(*inputs[1:4]) as counts:
        through(index, inputs)
    named = torch.zeros(400, dtype=torch.int64)
    named[index] = 1
    by_row = named[:, None].expand(400, 40)
    for count, wanted in zip(counts, (by_row, by_row, torch.ones(40, 400)), strict=True):
        assert torch.equal(torch.from_numpy(count).view(wanted.shape), wanted.long())


def test_neurons_outside_the_index_have_no_part():
    inputs = random_mlp(5, 33, 50, torch.float32)
    index = some_of(50, 20)
    outside = torch.ones(50, dtype=torch.bool)
    outside[index.long().cpu()] = False
    for i in (1, 2, 4, 5):
        inputs[i][outside.to(DEVICE)] = float("nan")
    inputs[3][:, outside.to(DEVICE)] = 1e30  # read, and multiplied by 0
    check(inputs, index)


def test_same_bits_every_run():
    inputs = random_mlp(2, 33, 400, torch.float32)
    index = some_of(400, 301)
    assert torch.equal(through(index, inputs), through(index, inputs))


@pytest.mark.parametrize("act", NAMES)
def test_nan_reaches_its_token_alone(act):
    inputs = random_mlp(3, 33, 41, torch.float16)
    inputs[0][1, 7] = float("nan")
    y = through(some_of(41, 20), inputs, NAMES.index(act))
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False]


def test_an_index_of_everything_is_the_dense_mlp():
    inputs = random_mlp(5, 33, 41, torch.float32)
    y = through(torch.arange(41, device=DEVICE), inputs)
    torch.testing.assert_close(y, gated_mlp_ref(*inputs, 0), rtol=1e-5, atol=1e-5)
