"""Launches written down instead of made, and configurations chosen."""

import pytest
import torch

pytest.importorskip("triton")

from prunekit_kernels import launch, tuning
from prunekit_kernels.gated_act_stats import gated_act_stats_triton


def test_a_recorded_launch_has_what_a_real_one_would_get():
    gate = torch.empty(64, 128, dtype=torch.bfloat16, device="meta")
    spans = torch.tensor([[0, 64]])
    with launch.recorded("gfx942") as launches:
        h, _, _ = gated_act_stats_triton(gate, gate, spans, 0)
    assert h.is_meta
    first, second = launches
    assert (first.name, second.name) == ("gated_act_stats", "reduce_segments")
    assert first.arguments["width"] == 128
    assert first.arguments["up"] is gate
    assert first.options["num_warps"] == 1  # a wavefront of 64 lanes
    with launch.recorded("sm_90") as launches:
        gated_act_stats_triton(gate, None, spans, 0)
    assert launches[0].options["num_warps"] == 2


def test_architecture():
    assert launch.architecture(torch.device("cpu")) == "interpreter"
    with launch.assumed("sm_80"):
        assert launch.architecture(torch.device("cpu")) == "sm_80"
    assert launch.architecture(torch.device("cpu")) == "interpreter"
    assert launch.multiprocessors("sm_80") == 108


def test_a_measured_configuration_comes_before_the_default():
    measured = {"dual_product sm_90 bfloat16 512x1536x8960": {"BLOCK_M": 64}}

    def chosen(tokens, width):
        shape = tokens, 1536, width
        return tuning.choose("dual_product", "sm_90", torch.bfloat16, *shape, default={"d": 1})

    with tuning.serving(measured):
        assert chosen(300, 8960) == chosen(512, 8960) == {"BLOCK_M": 64}
        assert chosen(513, 8960) == chosen(512, 4480) == {"d": 1}
        with tuning.trying("dual_product", {"BLOCK_M": 32}):
            assert chosen(512, 8960) == chosen(512, 4480) == {"BLOCK_M": 32}
        assert chosen(512, 4480) == {"d": 1}


def test_a_table_serves_inside_its_block_alone():
    def chosen():
        return tuning.choose("toy", "sm_90", torch.float16, 1, 8, default={"d": 1})

    measured = tuning.table()
    outer, inner = {"toy sm_90 float16 1x8": {"A": 1}}, {"toy sm_90 float16 1x8": {"A": 2}}
    with pytest.raises(ZeroDivisionError), tuning.serving(outer) as served:
        assert served is outer
        with tuning.serving(inner):
            assert chosen() == {"A": 2}
        assert chosen() == {"A": 1}
        1 / 0  # noqa: B018
    assert tuning.table() is measured


def test_an_empty_grid_is_not_launched():
    launch.launch(None, (0, 4))
