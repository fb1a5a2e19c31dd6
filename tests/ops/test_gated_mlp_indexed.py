"""gated_mlp_indexed is gated_mlp over compacted weights."""

import pytest
import torch

from prunekit import ops
from tests.ops.test_gated_mlp import weights

INDEX = [0, 3, 4, 11]


def compacted(parts, index):
    gate, up, down, gate_bias, up_bias, down_bias = parts
    rows = [None if t is None else t[index] for t in (gate, up)]
    biases = [None if t is None else t[index] for t in (gate_bias, up_bias)]
    return (*rows, down[:, index], *biases, down_bias)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 5, 7)])
def test_gated_mlp_indexed(shape, gated, bias, dtype):
    parts = weights(7, 13, gated=gated, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    index = torch.tensor(INDEX, dtype=dtype)
    gate, up, down, *biases = parts
    names = dict(zip(("gate_bias", "up_bias", "down_bias"), biases, strict=True))
    got = ops.gated_mlp_indexed(x, gate, up, down, index, **names, act="gelu")
    want = ops.gated_mlp_ref(x, *compacted(parts, INDEX), ops.activation_code("gelu"))
    torch.testing.assert_close(got, want)


def test_opcheck():
    gate, up, down, *biases = weights(3, 4, dtype=torch.float32)
    index = torch.tensor([1, 3])
    arguments = (torch.randn(2, 3), gate, up, down, index, *biases, 0)
    torch.library.opcheck(torch.ops.prunekit.gated_mlp_indexed.default, arguments)


def test_wrong_arguments():
    gate, up, down, *_ = weights(3, 4)
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"index must be a vector of int32 or int64, got torch\.b"):
        ops.gated_mlp_indexed(x, gate, up, down, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"gated_mlp_indexed: x .* does not fit gate \(4, 3\)"):
        ops.gated_mlp_indexed(x[:, :2], gate, up, down, torch.tensor([0]))
