"""The MLP through an index, in Triton: its numbers and its loads in the interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")

from prunekit.ops.activations import NAMES
from prunekit.ops.gated_mlp import gated_mlp_ref
from prunekit_kernels import launch, tuning
from prunekit_kernels.gated_mlp_indexed import CANDIDATES, gated_mlp_indexed_triton
from tests.kernels import test_gated_mlp_decode as decode
from tests.kernels.test_gated_mlp_decode import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    metered,
    random_mlp,
)

pytestmark = decode.pytestmark
_poisoned_outputs = decode._poisoned_outputs


def compacted(inputs, index):
    """The same MLP with the named neurons' weights copied together."""
    x, gate, up, down, gate_bias, up_bias, down_bias = inputs
    rows = [None if t is None else t[index.long()] for t in (gate, up, gate_bias, up_bias)]
    return [x, *rows[:2], down[:, index.long()].contiguous(), *rows[2:], down_bias]


def check(inputs, index, act=0):
    """Hold y's error to twice that of torch's own products with the compact weights."""
    x, gate, up, down, *biases = inputs
    y = gated_mlp_indexed_triton(x, gate, up, down, index, *biases, act)
    decode.check_against_exact(y, compacted(inputs, index), act)


def some_of(width, kept, dtype=torch.int32):
    """An index in no order, as a nested checkpoint has it, the last neuron among it."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    order = torch.cat([order[order == width - 1], order[order != width - 1]])
    return order[:kept].to(DEVICE, dtype)


SHAPES = [  # tokens, hidden, width, kept: the interpreter's tiles are 16 by 16, its steps 32
    (0, 5, 7, 3),
    (1, 1, 1, 1),
    (1, 33, 400, 301),  # two splits
    (7, 70, 50, 37),
    (16, 20, 64, 64),
    (33, 40, 41, 17),
    (33, 130, 75, 40),
    (3, 20, 9, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_mlp_indexed(dtype, shape):
    *sizes, kept = shape
    check(random_mlp(*sizes, dtype), some_of(sizes[-1], kept))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_index_types_and_repeats(dtype):
    index = torch.tensor([4, 4, 0, 49, 7], dtype=dtype, device=DEVICE)
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
def test_decoding_loads_each_named_weight_once_and_no_other():
    inputs = random_mlp(5, 40, 400, torch.float16)
    _, gate, up, down, *biases = inputs
    index = some_of(400, 301, torch.int64)
    with metered(gate, up, down) as counts:
        gated_mlp_indexed_triton(inputs[0], gate, up, down, index, *biases, 0)
    named = torch.zeros(400, dtype=torch.int64)
    named[index] = 1
    by_row, by_column = named[:, None].expand(400, 40), named[None, :].expand(40, 400)
    for count, wanted in zip(counts, (by_row, by_row, by_column), strict=True):
        assert torch.equal(torch.from_numpy(count).view(wanted.shape), wanted)


def test_neurons_outside_the_index_have_no_part():
    inputs = random_mlp(5, 33, 50, torch.float32)
    index = some_of(50, 20)
    outside = torch.ones(50, dtype=torch.bool)
    outside[index.long().cpu()] = False
    for i in (1, 2, 4, 5):
        inputs[i][outside.to(DEVICE)] = float("nan")
    inputs[3][:, outside.to(DEVICE)] = float("nan")
    check(inputs, index)


def test_same_bits_every_run():
    x, gate, up, down, *biases = random_mlp(2, 33, 400, torch.float32)
    index = some_of(400, 301)
    runs = [gated_mlp_indexed_triton(x, gate, up, down, index, *biases, 0) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("act", NAMES)
def test_nan_reaches_its_token_alone(act):
    x, gate, up, down, *biases = random_mlp(3, 33, 41, torch.float16)
    x[1, 7] = float("nan")
    index = some_of(41, 20)
    y = gated_mlp_indexed_triton(x, gate, up, down, index, *biases, NAMES.index(act))
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["indexed_hidden", "indexed_down"])
def test_every_candidate_computes_the_same(name):
    inputs = random_mlp(20, 70, 200, torch.float32)
    for config in CANDIDATES[name]:
        with tuning.trying(name, config):
            check(inputs, some_of(200, 150))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"])
def test_few_tokens_split_the_down_product_and_many_do_not(arch):
    def weight(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    index = torch.empty(7168, dtype=torch.int32, device="meta")
    for tokens, kernels in ((1, 3), (16, 3), (16384, 2)):
        tensors = weight(tokens, 1536), weight(8960, 1536), weight(8960, 1536), weight(1536, 8960)
        with launch.recorded(arch) as launches:
            gated_mlp_indexed_triton(*tensors, index, None, None, weight(1536), 0)
        assert len(launches) == kernels
        assert math.prod(launches[1].grid) >= launch.multiprocessors(arch)


def test_unsupported_dtype():
    x, gate, up, down, *biases = random_mlp(1, 4, 4, torch.float64)
    with pytest.raises(
        ValueError, match=r"one of bfloat16, float16 and float32, got torch\.float64"
    ):
        gated_mlp_indexed_triton(x, gate, up, down, some_of(4, 2), *biases, 0)


def test_an_index_of_everything_is_the_dense_mlp():
    inputs = random_mlp(5, 33, 41, torch.float32)
    x, gate, up, down, *biases = inputs
    index = torch.arange(41, device=DEVICE)
    y = gated_mlp_indexed_triton(x, gate, up, down, index, *biases, 0)
    torch.testing.assert_close(y, gated_mlp_ref(*inputs, 0), rtol=1e-5, atol=1e-5)
