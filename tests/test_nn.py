"""CompactMLP is the MLP it replaces: same values, same names, same gradients, no graph break."""

import copy

import pytest
import torch

import prunekit as pk
from prunekit.errors import InputError
from tests.models import logits, random_ids, tiny_model

REPLACEABLE = ("llama", "llama_bias", "qwen3", "gemma2", "phi3", "phi", "gpt_neox")


@pytest.mark.parametrize("name", REPLACEABLE)
def test_a_compact_model_computes_the_same_under_the_same_names(name):
    model = tiny_model(name)
    names, before = set(model.state_dict()), logits(model)
    pk.compact_modules(model)
    assert set(model.state_dict()) == names
    assert sum(isinstance(m, pk.CompactMLP) for m in model.modules()) == 2
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_a_plan_prunes_on_the_way(llama):
    plan = pk.plan([torch.rand(96), torch.rand(96)], 0.5, multiple_of=16)
    expected = logits(pk.prune(copy.deepcopy(llama), plan))
    pk.compact_modules(llama, plan=plan)
    assert [m.intermediate_size for m in llama.modules() if isinstance(m, pk.CompactMLP)] == [
        48
    ] * 2
    torch.testing.assert_close(logits(llama), expected, rtol=1e-5, atol=1e-5)


def test_a_compact_model_can_be_pruned_calibrated_and_saved_again(
    llama, tokenizer, texts, tmp_path
):
    pk.compact_modules(llama)
    stats = pk.calibrate(llama, tokenizer, texts, gram=True, quiet=True)
    pk.prune(llama, pk.plan(pk.score(stats, llama), 0.5, multiple_of=16), stats=stats)
    pk.save(llama, None, tmp_path / "out")
    again = pk.load(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(llama), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_bias", "phi3", "phi"])
def test_gradients_flow_to_every_projection(name):
    model, compact = tiny_model(name), pk.compact_modules(tiny_model(name))
    for m in (model, compact):
        m(input_ids=random_ids(m), labels=random_ids(m)).loss.backward()
    expected = dict(model.named_parameters())
    for key, parameter in compact.named_parameters():
        if "mlp" in key:
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "gpt2", "mixtral"])
def test_what_cannot_be_replaced_is_named(name):
    model = tiny_model(name)
    before = logits(model)
    with pytest.raises(InputError, match=r"compact_modules: .* it runs as it is"):
        pk.compact_modules(model)
    assert torch.equal(logits(model), before)


def test_torch_compile_sees_one_graph(llama):
    mlp = pk.compact_modules(llama).model.layers[0].mlp
    x = torch.randn(3, 32)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))


class _Adapter(torch.nn.Module):
    """What LoRA does to a projection: the same names inside, and something added to its output."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return self.base_layer(x) + 0.5 * x.mean()


@pytest.mark.parametrize(("name", "projection"), [("llama", "up_proj"), ("phi3", "gate_up_proj")])
def test_adapters_and_hooks_on_projections_are_not_passed_over(name, projection):
    model, compact = tiny_model(name), pk.compact_modules(tiny_model(name))
    for m in (model, compact):
        mlp = m.model.layers[0].mlp
        setattr(mlp, projection, _Adapter(getattr(mlp, projection)))
    assert not torch.equal(logits(model), logits(tiny_model(name)))
    torch.testing.assert_close(logits(compact), logits(model), rtol=1e-5, atol=1e-5)
    seen = []
    compact.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    logits(compact)
    assert seen == [1]


@pytest.mark.parametrize("name", ["llama_bias", "phi3", "gpt_neox"])
def test_a_plan_is_tried_without_changing_a_weight(name):
    model = pk.compact_modules(tiny_model(name))
    plan = pk.plan([torch.rand(v.width) for v in pk.find_mlps(model)], 0.5, multiple_of=1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        dense = model(ids).logits
        with pk.trying(model, plan):
            tried = model(ids).logits
        again = model(ids).logits
        pruned = pk.prune(model, plan)(ids).logits
    assert torch.equal(dense, again)
    torch.testing.assert_close(tried, pruned)
    assert not torch.allclose(tried, dense)


def test_a_plan_is_tried_under_an_adapter_too(llama):
    model = pk.compact_modules(llama)
    plan = pk.plan([torch.rand(v.width) for v in pk.find_mlps(model)], 0.5, multiple_of=1)
    ids = torch.arange(12)[None]
    with torch.no_grad(), pk.trying(model, plan):
        want = model(ids).logits
        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(ids).logits, want)
        hook.remove()


def test_trying_needs_compact_modules(llama):
    plan = pk.plan([torch.rand(v.width) for v in pk.find_mlps(llama)], 0.5, multiple_of=1)
    with (
        pytest.raises(InputError, match="is no CompactMLP; call compact_modules first"),
        pk.trying(llama, plan),
    ):
        pass


def test_torch_compile_serves_prefill_and_decode_by_turns(llama):
    """The second length makes Dynamo treat the tokens as unknown."""
    mlp = pk.compact_modules(llama).model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (40, 20, 7, 4, 3, 2, 1):
            x = torch.randn(tokens, 32)
            torch.testing.assert_close(compiled(x), mlp(x))
