"""Discovery shows every architecture's MLPs as the same view, and refuses what it does not know."""

import pytest
import torch
from torch import nn

from prunekit.arch import _LAYOUTS as LAYOUTS
from prunekit.arch import all_finite, find_mlps, register_arch
from prunekit.compact import prune
from prunekit.errors import InputError
from prunekit.plan import PrunePlan
from tests.models import TINY, logits, tiny_model

KINDS = {
    "phi3": "fused",
    "opt": "plain",
    "gpt_neox": "plain",
    "phi": "plain",
    "gpt2": "conv1d",
    "mixtral": "experts",
    "qwen2_moe": "experts",
    "qwen3_moe": "experts",
}


def test_views_read_the_models_own_parameters(architecture):
    model = tiny_model(architecture)
    views = find_mlps(model)
    assert {v.layer for v in views} == {0, 1}
    assert KINDS.get(architecture, "gated") in {v.kind for v in views}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for view in views:
        for matrix in (view.gate, view.up, view.down, view.gate_bias, view.up_bias):
            if matrix is not None:
                assert matrix.untyped_storage().data_ptr() in storages
        assert view.gate.shape == (view.width, 32)
        assert view.down.shape == (32, view.width)


def _silence(model, fraction=0.5):
    """Zero every way in and out of some neurons; return a plan that removes just those."""
    kept = []
    with torch.no_grad():
        for i, view in enumerate(find_mlps(model)):
            order = torch.randperm(view.width, generator=torch.Generator().manual_seed(i))
            dead = order[: int(view.width * fraction)]
            for matrix in (view.gate, view.up, view.gate_bias, view.up_bias):
                if matrix is not None:
                    matrix[dead] = 0
            view.down[:, dead] = 0
            kept.append(order[int(view.width * fraction) :].sort().values.int())
    widths = tuple(view.width for view in find_mlps(model))
    return PrunePlan(tuple(kept), widths)


def test_removing_silent_neurons_keeps_the_logits(architecture):
    model = tiny_model(architecture)
    plan = _silence(model)
    before = logits(model)
    prune(model, plan, compensate="none")
    after = logits(model)
    assert [v.width for v in find_mlps(model)] == plan.widths()
    # The matrix products sum the same terms in another order, so bits may differ, values may not.
    assert (after - before).norm() / before.norm() < 1e-5


ACT_KEYS = {
    "gemma2": "hidden_activation",
    "gemma3": "hidden_activation",
    "opt": "activation_function",
    "gpt2": "activation_function",
}


def test_where_sums_are_exact_removing_silent_neurons_changes_no_bit(architecture):
    """Small integers and relu: every sum is exact in fp32, in whatever order a product takes it."""
    model = tiny_model(architecture, **{ACT_KEYS.get(architecture, "hidden_act"): "relu"})
    with torch.no_grad():
        for view in find_mlps(model):
            for p in (view.gate, view.up, view.down, view.gate_bias, view.up_bias, view.down_bias):
                if p is not None:
                    p.copy_(torch.randint(-3, 4, p.shape))
    plan = _silence(model)
    x = torch.randint(-3, 4, (5, 32)).float()
    before = [view.apply(x) for view in find_mlps(model)]
    prune(model, plan, compensate="none")
    assert all(y.abs().max() > 0 for y in before)
    for view, y in zip(find_mlps(model), before, strict=True):
        assert torch.equal(view.apply(x), y)
        if view.kind != "experts" and architecture != "opt":  # those cannot run alone
            assert torch.equal(view.module(x), y)


def test_pruning_keeps_the_kept_weights_bit_for_bit(architecture):
    model = tiny_model(architecture)
    views = find_mlps(model)
    x = torch.randn(5, 32)
    kept = tuple(torch.arange(0, v.width, 2, dtype=torch.int32) for v in views)
    before = [(v.gate[::2].clone(), v.down[:, ::2].clone()) for v in views]
    prune(model, PrunePlan(kept, tuple(v.width for v in views)), compensate="none")
    for view, (gate, down) in zip(find_mlps(model), before, strict=True):
        assert torch.equal(view.gate, gate)
        assert torch.equal(view.down, down)
        assert torch.isfinite(view.apply(x)).all()


def test_the_configuration_follows(architecture):
    model = tiny_model(architecture)
    key = TINY[architecture][2]
    views = find_mlps(model)
    kept = tuple(torch.arange(v.width // 2, dtype=torch.int32) for v in views)
    prune(model, PrunePlan(kept, tuple(v.width for v in views)), compensate="none")
    expected = {v.width for v in find_mlps(model) if v.width_key == key}
    assert {getattr(model.config, key)} == expected


class _Strange(nn.Module):
    """Looks like a gated MLP, but squares its gate."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) ** 2 * self.up_proj(x))


def test_a_module_that_computes_something_else_is_refused(llama):
    llama.model.layers[0].mlp = _Strange(llama.model.layers[0].mlp)
    with pytest.raises(InputError, match=r"layers\.0\.mlp: _Strange computes something else"):
        find_mlps(llama)


class _Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        return self.inner(x)


def test_an_unknown_mlp_is_refused_by_name_and_can_be_registered(llama):
    llama.model.layers[1].mlp = _Unknown()
    with pytest.raises(InputError, match=r"layers without one: \[1\].*_Unknown.*register_arch"):
        find_mlps(llama)
    first = find_mlps(tiny_model("llama"))[0]

    def layout(name, module, model):
        return [first] if isinstance(module, _Unknown) else None

    register_arch(layout)
    try:
        # Registered for another module on purpose: its view is used, so its layer number shows.
        with pytest.raises(InputError, match="layers without one"):
            find_mlps(llama)
        assert len(find_mlps(tiny_model("llama"))) == 2
    finally:
        LAYOUTS.remove(layout)


def test_a_model_without_mlps_is_refused_with_the_modules_seen():
    from transformers import AutoModelForCausalLM, MambaConfig

    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=2))
    with pytest.raises(
        InputError, match=r"without one: \[0, 1\].*seen: .*MambaMixer.*register_arch"
    ):
        find_mlps(model)


def test_an_unknown_activation_is_refused():
    model = tiny_model("llama", hidden_act="sigmoid")
    with pytest.raises(InputError, match=r"act_fn: .* is none of silu, gelu"):
        find_mlps(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 63, 64, 1000, 4098])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(dtype, value, place):
    tensor = torch.randn(3, 1366 + 1).to(dtype)
    assert all_finite(tensor)
    assert all_finite(tensor.T)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.T)
    assert all_finite(torch.empty(0, 4, dtype=dtype))
