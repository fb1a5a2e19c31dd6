"""Plans are rehearsed on prompts that repair nothing, and what they like best is taken."""

import copy

import pytest
import torch
import torch.nn.functional as F

import prunekit as pk
from prunekit import choose as module
from prunekit.arch import find_mlps
from prunekit.choose import choose, planned
from prunekit.compensate import rehearse
from prunekit.compensate.sequential import HELD_OUT, _groups, walked
from prunekit.compensate.teacher import Verdict
from prunekit.errors import InputError
from prunekit.plan import plan
from tests.models import tiny_model


@pytest.fixture
def stats(llama, tokenizer, texts):
    return pk.calibrate(llama, tokenizer, texts, gram=True, gradients=True, quiet=True)


def kept_of(model, sparsity=0.5):
    return plan(pk.score(None, model, "random"), sparsity, multiple_of=8).kept


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_a_rehearsal_says_what_the_repaired_model_says_of_the_prompts_left_out(
    name, tokenizer, texts
):
    model = tiny_model(name)
    dense, views = copy.deepcopy(model), find_mlps(model)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    kept = kept_of(model)
    found = rehearse(model, views, kept, stats, quiet=True)
    total = loss = count = 0.0
    left_out = {i for batch in _groups(stats)[::HELD_OUT] for i in batch.index}
    with torch.no_grad(), walked(model, views, kept, stats, whole=False, quiet=True):
        for index in left_out:
            ids = torch.tensor([stats.prompts[index].ids])
            logs = [m(input_ids=ids).logits[:, :-1].log_softmax(-1) for m in (model, dense)]
            total += F.kl_div(*logs, reduction="sum", log_target=True).item()
            loss += F.nll_loss(logs[0][0], ids[0, 1:], reduction="sum").item()
            count += ids.numel() - 1
    assert 0 < len(left_out) < len(stats.prompts)
    assert found.divergence == pytest.approx(total / count, rel=0.15)  # 36 tokens count as one
    assert found.loss == pytest.approx(loss / count, rel=1e-3)
    assert found.weight == count
    for mine, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, before)


def test_a_rehearsal_repairs_by_fewer_prompts(llama, stats):
    views, kept = find_mlps(llama), kept_of(llama)
    with torch.no_grad(), walked(llama, views, kept, stats, whole=False, quiet=True) as walk:
        alone = [repair.down for repair in walk.repairs]
    with torch.no_grad(), walked(llama, views, kept, stats, whole=True, quiet=True) as walk:
        together = [repair.down for repair in walk.repairs]
    assert not torch.allclose(alone[0], together[0])


def test_nothing_removed_is_nothing_lost(llama, stats):
    everything = [torch.arange(view.width) for view in find_mlps(llama)]
    assert rehearse(llama, find_mlps(llama), everything, stats, quiet=True).divergence < 1e-4


def test_the_best_is_chosen(llama, stats):
    scores = pk.score(stats, llama)
    plans = [plan(scores, s, multiple_of=8) for s in (0.75, 0.25, 0.5)]
    best, found = choose(llama, plans, stats, quiet=True)
    assert best is plans[1]
    assert found[1].mixed < found[2].mixed < found[0].mixed


@pytest.mark.parametrize(
    ("budget", "uniform"),
    [
        (Verdict(0.1, 2.0, 9.0), Verdict(0.2, 2.0, 9.0)),
        (Verdict(0.2, 2.0, 9.0), Verdict(0.1, 2.0, 9.0)),
        (Verdict(0.11, 2.0, 9.0), Verdict(0.1, 2.2, 9.0)),  # what is further may serve better
    ],
)
def test_budget_is_taken_where_it_is_worth_more_than_uniform(
    llama, stats, monkeypatch, budget, uniform
):
    scores = pk.score(stats, llama, "reconstruction_fisher")
    scores[0] = 20 * scores[0]  # the first layer is dear: a budget gives it more
    costs = pk.sensitivity(scores, llama)
    said = iter((budget, uniform))
    monkeypatch.setattr(module, "rehearse", lambda *_, **__: next(said))
    options = {"allocation": "budget", "sensitivity": costs, "multiple_of": 8}
    found = planned(llama, stats, scores, 0.5, **options)
    assert (len(set(found.widths())) > 1) is (budget.mixed < uniform.mixed)
    said = found.recipe["rehearsed"]
    assert said["budget"] == {"loss": budget.loss, "divergence": budget.divergence}
    assert said["uniform"] == {"loss": uniform.loss, "divergence": uniform.divergence}
    assert found.recipe["allocation"] == "budget"
    alone = planned(llama, stats, scores, 0.5, compensate="lstsq", **options)
    assert len(set(alone.widths())) > 1
    assert "rehearsed" not in alone.recipe


def test_where_both_are_the_same_nothing_is_rehearsed(llama, stats, monkeypatch):
    monkeypatch.setattr(module, "rehearse", None)
    scores = [torch.arange(view.width, dtype=torch.float32) ** 3 for view in find_mlps(llama)]
    options = {"allocation": "budget", "sensitivity": pk.sensitivity(scores, llama)}
    found = planned(llama, stats, scores, 0.5, multiple_of=8, **options)
    assert set(found.widths()) == {found.widths()[0]}


def test_a_plan_of_another_model_is_refused(llama, stats):
    other = plan([torch.rand(40), torch.rand(40)], 0.5, multiple_of=8)
    with pytest.raises(InputError, match="another model"):
        choose(llama, [other], stats)
