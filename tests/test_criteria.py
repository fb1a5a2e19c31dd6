"""Criteria equal their formulas, and say what they lack."""

import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.compensate import repair
from prunekit.criteria import CRITERIA, criterion
from prunekit.criteria.auto import resolved
from prunekit.criteria.reconstruction import eliminate
from prunekit.errors import InputError
from tests.models import tiny_model
from tests.test_stats import h_of_each_prompt


@pytest.fixture
def stats(llama, tokenizer, texts):
    options = {"gram": True, "taylor": True, "quiet": True}
    return pk.calibrate(llama, tokenizer, texts[:30], [texts[30:]], **options)


# name: the formula over h (one [tokens, F] a prompt), all tokens t [T, F], and the weights, in fp64
FORMULAS = {
    "mean_abs": lambda h, t, gate, up, down: t.abs().mean(0),
    "rms": lambda h, t, gate, up, down: t.square().mean(0).sqrt(),
    "wanda": lambda h, t, gate, up, down: t.square().mean(0).sqrt() * down.square().sum(0).sqrt(),
    "wanda_sp": lambda h, t, gate, up, down: (down.abs() * t.square().sum(0).sqrt()).mean(0),
    "minitron": lambda h, t, gate, up, down: torch.stack([p.abs().mean(0) for p in h]).norm(dim=0),
    "fluctuation": lambda h, t, gate, up, down: t.var(0, correction=0) * down.square().sum(0),
    "two_stage": lambda h, t, gate, up, down: torch.stack([p.norm(dim=0) for p in h]).mean(0),
    "puzzletron_independent": lambda h, t, gate, up, down: (
        down.norm(dim=0) * sum(p.abs().mean(0) for p in h)
    ),
    "magnitude_ppm": lambda h, t, gate, up, down: sum(
        torch.tensor([max(row) + abs(min(row)) for row in matrix.tolist()], dtype=torch.float64)
        for matrix in (gate, up)
        if matrix is not None
    ),
    "magnitude_l2": lambda h, t, gate, up, down: torch.cat(
        [matrix for matrix in (gate, up, down.T) if matrix is not None], dim=1
    ).norm(dim=1),
}


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
def test_criteria_equal_their_formulas_over_stored_activations(name, tokenizer, texts):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, batch_tokens=100, quiet=True)
    prompts = h_of_each_prompt(model, tokenizer, texts)
    views = find_mlps(model)
    for criterion_name, formula in FORMULAS.items():
        for i, found in enumerate(pk.score(stats, model, criterion_name)):
            h = [mlps[i] for mlps in prompts]
            matrices = (views[i].gate, views[i].up, views[i].down)
            weights = [m if m is None else m.detach().double() for m in matrices]
            expected = formula(h, torch.cat(h), *weights)
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (criterion_name, i)


def test_every_criterion_is_tested():
    elsewhere = {"auto", "random", "selectivity", "taylor", "reconstruction"}
    assert set(CRITERIA) == set(FORMULAS) | elsewhere | {"reconstruction_fisher"}


def test_random_differs_by_seed_and_needs_no_statistics(llama):
    first, again, other = (pk.score(None, llama, "random", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_every_criterion_gives_a_finite_fp32_score_a_neuron(llama, stats):
    for name in CRITERIA:
        for view, found in zip(find_mlps(llama), pk.score(stats, llama, name), strict=True):
            assert found.dtype == torch.float32
            assert found.shape == (view.width,)
            assert torch.isfinite(found).all()
            assert found.unique().numel() > view.width // 2


def error_without(down, gram, metric, removed):
    """The least trace(ΔW C ΔWᵀ M) when the columns ``removed`` go: solved from scratch."""
    kept = torch.tensor([i for i in range(gram.shape[0]) if i not in set(removed)])
    change = down.clone()
    if kept.numel():
        repaired = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ down.T).T
        change[:, kept] -= repaired
    return ((change @ gram @ change.T) * metric).sum().item()


def greedy_order(down, gram, metric):
    order = []
    for _ in range(gram.shape[0]):
        left = [i for i in range(gram.shape[0]) if i not in order]
        order.append(min(left, key=lambda i: error_without(down, gram, metric, [*order, i])))
    return order


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("block", [1, 8, 128])  # one neuron a round; two rounds; all in one pool
def test_elimination_is_the_greedy_order_solved_from_scratch(block, fisher):
    h = torch.randn(60, 8, dtype=torch.float64) @ torch.randn(8, 20, dtype=torch.float64)
    gram = h.T @ h / 60 + 0.1 * torch.eye(20, dtype=torch.float64)
    down = torch.randn(6, 20, dtype=torch.float64)
    g = torch.randn(30, 6, dtype=torch.float64) * torch.tensor([9, 3, 1, 1, 0.3, 0.1])
    metric = g.T @ g if fisher else torch.eye(6, dtype=torch.float64)
    inverse = torch.linalg.inv(gram)
    order, costs = eliminate(down.clone(), inverse, metric if fisher else None, block)
    order = order.tolist()
    exact = greedy_order(down, gram, metric)
    assert sorted(order) == list(range(20))
    for count in (1, 7, 15):  # what the order costs, solved from scratch
        error = error_without(down, gram, metric, order[:count])
        assert costs[:count].sum().item() == pytest.approx(error, rel=1e-6)
    if block == 8:  # the first round may look beyond its pool no more
        errors = [error_without(down, gram, metric, o[:10]) for o in (order, exact)]
        assert errors[0] < 1.2 * errors[1]
    else:
        assert order == exact


@pytest.mark.parametrize("criterion_name", ["reconstruction", "reconstruction_fisher"])
def test_elimination_leaves_weights_and_statistics_as_they_were(criterion_name, tokenizer, texts):
    """It works in the matrices that it is given; those of an fp64 model would be the weights."""
    model = tiny_model("llama", intermediate_size=320).double()  # two rounds
    stats = pk.calibrate(model, tokenizer, texts, gram=True, gradients=True, quiet=True)
    views = find_mlps(model)
    kept = [(v.down.clone(), s.gram.clone()) for v, s in zip(views, stats.target, strict=True)]
    pk.score(stats, model, criterion_name)
    for (down, gram), view, sums in zip(kept, views, stats.target, strict=True):
        assert torch.equal(view.down, down)
        assert torch.equal(sums.gram, gram)


def test_of_two_equal_neurons_one_stays_even_within_a_block():
    """Each of a pair costs nothing while the other is there; both at once cost much."""
    h = torch.randn(100, 16, dtype=torch.float64).repeat(1, 2)
    gram = h.T @ h / 100 + 1e-4 * torch.eye(32, dtype=torch.float64)
    down = torch.randn(8, 32, dtype=torch.float64)
    for block in (4, 16):
        first = eliminate(down.clone(), torch.linalg.inv(gram), None, block)[0][:16]
        assert sorted((first % 16).tolist()) == list(range(16))


@pytest.mark.parametrize("name", ["llama", "llama_bias"])
@pytest.mark.parametrize("criterion_name", ["reconstruction", "reconstruction_fisher"])
def test_reconstruction_of_a_model_is_the_greedy_order(name, criterion_name, tokenizer, texts):
    """From stored activations; where down has a bias, that takes the mean, and C is centred."""
    model = tiny_model(name, intermediate_size=32)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, taylor=True, quiet=True)
    prompts = h_of_each_prompt(model, tokenizer, texts)
    found = pk.score(stats, model, criterion_name)
    for i, view in enumerate(find_mlps(model)):
        h = torch.cat([mlps[i] for mlps in prompts])
        h = h - h.mean(0) if name == "llama_bias" else h
        gram = h.T @ h / len(h)
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(32)
        metric = torch.eye(32, dtype=torch.float64)
        if criterion_name == "reconstruction_fisher":
            metric = stats.target[i].gradient_gram.double() / len(h)
            metric += 1e-3 * metric.diagonal().mean() * torch.eye(32)
        down = view.down.detach().double()
        order, exact = found[i].argsort().tolist(), greedy_order(down, gram, metric)
        unit = len(h) / 2 if criterion_name == "reconstruction_fisher" else len(h)
        for count in (8, 16, 24):
            errors = [error_without(down, gram, metric, o[:count]) for o in (order, exact)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-3)
            cost = found[i].sort().values[count - 1].item()  # of removing all up to this score
            assert cost == pytest.approx(unit * errors[0], rel=1e-3)


def test_reconstruction_removes_what_lstsq_can_repair(llama, stats, tokenizer, texts):
    """After the repair, its choice of half the neurons costs less than Wanda's."""
    prompts = h_of_each_prompt(llama, tokenizer, texts[:30])
    errors = {}
    for name in ("reconstruction", "wanda"):
        plan = pk.plan(pk.score(stats, llama, name), 0.5, multiple_of=1)
        for i, view in enumerate(find_mlps(llama)):
            h, kept = torch.cat([mlps[i] for mlps in prompts]), plan.kept[i].long()
            fixed = repair(view, stats.target[i], kept, "lstsq").down
            lost = h @ view.down.detach().double().T - h[:, kept] @ fixed.T
            errors[name, i] = lost.square().sum()
    assert errors["reconstruction", 0] < errors["wanda", 0]
    assert errors["reconstruction", 1] < errors["wanda", 1]


def test_a_gram_matrix_that_is_not_positive_definite_gets_a_wider_ridge(llama, stats, caplog):
    """fp32 sums of strongly correlated neurons have eigenvalues below zero."""
    gram = stats.target[0].gram
    shift = torch.linalg.eigvalsh(gram)[0] + 2e-3 * gram.diagonal().mean()
    gram.diagonal().sub_(shift)
    assert pk.score(stats, llama, "reconstruction")[0].unique().numel() == 96
    assert "layers.0.mlp: its Gram matrix is not positive definite" in caplog.text
    gram.diagonal().sub_(1e5 * shift)
    with pytest.raises(InputError, match=r"layers\.0\.mlp: its Gram matrix cannot be inverted"):
        pk.score(stats, llama, "reconstruction")


@pytest.mark.parametrize(
    ("gathered", "chosen"),
    [
        ({"gram": True, "gradients": True}, "reconstruction_fisher"),
        ({"gram": True}, "wanda"),
        ({"gradients": True}, "wanda"),
    ],
    ids=["both", "gram", "gradients"],
)
def test_auto_is_the_best_that_the_statistics_suffice_for(
    gathered, chosen, llama, tokenizer, texts
):
    found = pk.calibrate(llama, tokenizer, texts[:5], **gathered, quiet=True)
    scores = pk.score(found, llama)
    expected = pk.score(found, llama, chosen)
    assert all(torch.equal(a, b) for a, b in zip(scores, expected, strict=True))
    assert resolved("auto", found, repaired=True) == chosen
    assert resolved("auto", found, repaired=False) == "wanda"
    assert resolved("rms", found, repaired=True) == "rms"


def test_an_expert_that_no_token_reached_scores_nothing(tokenizer, texts):
    model = tiny_model("mixtral")
    stats = pk.calibrate(model, tokenizer, ["w1 w2"], gram=True, taylor=True, quiet=True)
    assert any(sums.tokens == 0 for sums in stats.target)
    for name in set(CRITERIA) - {"random", "magnitude_l2", "magnitude_ppm", "selectivity"}:
        for sums, found in zip(stats.target, pk.score(stats, model, name), strict=True):
            assert sums.tokens or not found.any(), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reconstruction", "reconstruction: the statistics hold no gram; calibrate with --gram"),
        ("taylor", "taylor: the statistics hold no taylor; calibrate with --taylor"),
    ],
)
def test_what_was_not_gathered_names_the_option(name, message, llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts[:5], quiet=True)
    with pytest.raises(InputError, match=message):
        pk.score(stats, llama, name)


def test_an_unknown_criterion_lists_those_there_are(llama, stats):
    with pytest.raises(InputError, match=r"expected one of auto, .*, wanda, wanda_sp"):
        pk.score(stats, llama, "best")


def test_selectivity_without_distractors_says_so(llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts[:5], quiet=True)
    with pytest.raises(InputError, match="needs distractor statistics"):
        pk.score(stats, llama, "selectivity")


def test_statistics_of_another_model_are_refused(stats):
    with pytest.raises(InputError, match="taken on another model"):
        pk.score(stats, tiny_model("llama", intermediate_size=64), "wanda")


def test_one_can_register_ones_own_and_nan_is_refused(llama, stats):
    @criterion("broken", needs=())
    def broken(evidence):
        return torch.full((evidence.view.width,), float("nan"))

    try:
        with pytest.raises(InputError, match=r"criterion broken: .* scores that are not finite"):
            pk.score(stats, llama, "broken")
    finally:
        del CRITERIA["broken"]
