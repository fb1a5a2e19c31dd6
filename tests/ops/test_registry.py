"""A backend that is forced serves, or the call fails: never a silent other one."""

import os
import subprocess
import sys

import pytest
import torch

from prunekit import ops
from prunekit.ops.registry import OPERATIONS


def test_forcing_a_backend_that_an_operation_lacks_says_so():
    x, index = torch.ones(2, 2), torch.tensor([0])
    with ops.force_backend("cuda"):
        assert ops.forced_backend() == "cuda"
        with pytest.raises(ops.BackendError, match="gather_rows: backend cuda cannot serve it"):
            ops.gather_rows(x, index)
    assert ops.forced_backend() is None
    assert ops.gather_rows(x, index).shape == (1, 2)


def test_an_unknown_backend_lists_the_valid_ones():
    with (
        pytest.raises(ops.BackendError, match="expected one of reference, cpp, triton, cuda"),
        ops.force_backend("fast"),
    ):
        pass


@pytest.mark.parametrize(("value", "served"), [("reference", True), ("cuda", False)])
def test_the_environment_forces_too(value, served):
    code = (
        "import torch\n"
        "from prunekit import ops\n"
        "ops.gather_rows(torch.ones(2, 2), torch.tensor([1]))"
    )
    environment = os.environ | {"PRUNEKIT_BACKEND": value}
    run = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert (done.returncode == 0) is served
    assert served or "backend cuda cannot serve it" in done.stderr


def test_an_unknown_backend_in_the_environment_is_one_line():
    environment = os.environ | {"PRUNEKIT_BACKEND": "fast"}
    command = [sys.executable, "-m", "prunekit", "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    wanted = "PRUNEKIT_BACKEND: got 'fast'; expected one of reference, cpp, triton, cuda"
    assert done.stderr == f"prunekit env: {wanted}\n"


def test_every_operation_has_a_reference_and_a_schema():
    for name, operation in OPERATIONS.items():
        assert operation.backends["reference"] is operation.reference
        assert str(getattr(torch.ops.prunekit, name).default._schema).startswith(
            f"prunekit::{name}("
        )


def test_a_forced_backend_is_not_lost_where_a_gradient_is_taken(monkeypatch):
    """The call still passes the dispatcher, which is what records it for autograd."""
    gate, down = torch.randn(4, 3), torch.randn(3, 4)
    x = torch.randn(2, 3, requires_grad=True)
    served = []

    def kernel(*args):
        served.append("here")
        return ops.gated_mlp_ref(*args)

    monkeypatch.setitem(OPERATIONS["gated_mlp"].backends, "triton", kernel)
    monkeypatch.setitem(
        OPERATIONS["gated_mlp_backward"].backends, "triton", ops.gated_mlp_backward_ref
    )
    with ops.force_backend("triton"):
        ops.gated_mlp(x, gate, None, down).sum().backward()
    assert served == ["here"]
    assert x.grad is not None
