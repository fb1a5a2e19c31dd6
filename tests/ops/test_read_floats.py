"""read_floats adds up every float, however many are left over by threads, streams and vectors."""

import pytest
import torch

from prunekit.ops.backends import EXTENSION_PROBLEM

pytestmark = pytest.mark.skipif(EXTENSION_PROBLEM is not None, reason=str(EXTENSION_PROBLEM))

STREAMS, LANES = 8, 16  # the most lanes: those of AVX-512


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("left_over", [0, 1, LANES, STREAMS * LANES - 1])
@pytest.mark.parametrize("steps", [0, 1, 40])
def test_read_floats_is_the_sum(threads, steps, left_over):
    size = threads * STREAMS * LANES * steps + left_over
    torch.manual_seed(size)
    # Small integers, whose sums are exact in fp32 in any order.
    x = torch.randint(1, 9, (size,)).float()
    assert torch.ops.prunekit.read_floats(x) == x.double().sum().item()


def test_read_floats_of_any_values_is_near_the_sum(threads):
    torch.manual_seed(0)
    x = torch.randn(threads * STREAMS * LANES * 500 + 77)
    got, want = torch.ops.prunekit.read_floats(x), x.double().sum().item()
    # A lane of a stream adds 500 values in fp32, and then all of them are added.
    assert abs(got - want) <= 700 * torch.finfo(torch.float32).eps * x.abs().sum().item()


def test_read_floats_sees_nan_behind_the_last_vector(threads):
    x = torch.ones(threads * STREAMS * LANES + 1)
    x[-1] = torch.nan
    assert torch.ops.prunekit.read_floats(x) != torch.ops.prunekit.read_floats(x)


def test_read_floats_wants_contiguous_fp32():
    for x in (torch.ones(4, dtype=torch.float64), torch.ones(8)[::2]):
        with pytest.raises(ValueError, match="read_floats: x must be contiguous fp32 on the CPU"):
            torch.ops.prunekit.read_floats(x)
