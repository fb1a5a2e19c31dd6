"""gated_mlp_stats is gated_mlp and gated_act_stats together."""

import pytest
import torch
import torch.nn.functional as F

from prunekit import ops
from tests.ops.test_gated_mlp import weights

SPANS = torch.tensor([[1, 4], [4, 4], [5, 9]])
BACKENDS = [None, "reference"]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("act", ["silu", "relu2"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_gated_mlp_stats(backend, gated, bias, act):
    gate, up, down, *biases = weights(7, 13, gated=gated, bias=bias, dtype=torch.float32)
    x = torch.randn(11, 7)
    names = dict(zip(("gate_bias", "up_bias", "down_bias"), biases, strict=True))
    with ops.force_backend(backend):
        got = ops.gated_mlp_stats(x, gate, up, down, SPANS, **names, act=act)
    g = F.linear(x, gate, biases[0])
    u = None if up is None else F.linear(x, up, biases[1])
    stats = ops.gated_act_stats_ref(g, u, SPANS, ops.activation_code(act))
    y = ops.gated_mlp_ref(x, gate, up, down, *biases, ops.activation_code(act))
    for ours, want in zip(got, (y, *stats), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_opcheck():
    gate, up, down, *biases = weights(3, 4, dtype=torch.float32)
    arguments = (torch.randn(9, 3), gate, up, down, *biases, SPANS, 0)
    torch.library.opcheck(torch.ops.prunekit.gated_mlp_stats.default, arguments)


def test_wrong_arguments():
    gate, up, down, *_ = weights(3, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x must be \[T, D\], got 3 dimensions"):
        ops.gated_mlp_stats(torch.randn(1, 2, 3), gate, up, down, SPANS)
    with pytest.raises(ValueError, match=r"gated_mlp_stats: spans must ascend .* within \[0, 2\]"):
        ops.gated_mlp_stats(torch.randn(2, 3), gate, up, down, SPANS)
