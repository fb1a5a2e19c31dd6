"""Distillation brings a pruned model closer to the dense one than the repair it starts from."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.batching import Tokens, batches
from prunekit.compensate import Teacher, sequential
from prunekit.compensate.teacher import counted_logits
from prunekit.errors import InputError
from tests.models import tiny_model


@pytest.fixture
def many_texts():
    """240 prompts of 24 words from a Markov chain: two thirds to calibrate, the others held out."""
    generator = torch.Generator().manual_seed(5)
    chain = torch.randn(90, 90, generator=generator).mul(2).softmax(-1)
    words = torch.randint(0, 90, (240, 1), generator=generator)
    for _ in range(23):
        following = torch.multinomial(chain[words[:, -1]], 1, generator=generator)
        words = torch.cat([words, following], dim=1)
    return [" ".join(f"w{w}" for w in row) for row in words.tolist()]


def calibrated(model, tokenizer, texts):
    stats = pk.calibrate(model, tokenizer, texts, gram=True, quiet=True)
    return stats, pk.plan(pk.score(stats, model), 0.5, multiple_of=8)


@torch.no_grad()
@torch.no_grad()
def taught(model, prompts):
    """A teacher that heard what the model itself says."""
    teacher = Teacher(prompts)
    for batch in batches(prompts, 256):
        teacher.hear(batch, model(input_ids=batch.ids, use_cache=False).logits)
    return teacher


def full_divergence(dense, model, tokenizer, texts):
    """KL(dense ‖ model) a token, over the whole vocabulary."""
    ids = torch.tensor([tokenizer(text).input_ids for text in texts])
    want, got = (m(input_ids=ids).logits.float().log_softmax(-1) for m in (dense, model))
    return F.kl_div(got, want, reduction="sum", log_target=True).item() / ids.numel()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("phi3", torch.bfloat16),
        ("gpt2", torch.float32),
        ("qwen2_moe", torch.bfloat16),
    ],
)
def test_distillation_goes_on_where_the_repair_ends(name, dtype, tokenizer, many_texts):
    learnt, held_out = many_texts[:160], many_texts[160:]
    dense = tiny_model(name).to(dtype)
    stats, plan = calibrated(dense, tokenizer, learnt)
    repaired, distilled = copy.deepcopy(dense), copy.deepcopy(dense)
    pk.prune(repaired, plan, stats=stats, compensate="sequential")
    pk.prune(distilled, plan, stats=stats, compensate="distill", steps=150)
    before = full_divergence(dense, repaired, tokenizer, held_out)
    assert full_divergence(dense, distilled, tokenizer, held_out) < 0.9 * before
    assert distilled.prunekit["distill_steps"] == 150


@pytest.mark.parametrize(("top", "least", "most"), [(100, 0.99, 1.01), (64, 0.8, 0.999)])
def test_the_divergence_is_that_of_the_whole_vocabulary_but_for_a_little(
    top, least, most, llama, tokenizer, texts, monkeypatch
):
    """Of 100 tokens all are kept, or 64: those beyond count as one, which can only hide some."""
    monkeypatch.setattr(importlib.import_module("prunekit.compensate.teacher"), "TOP", top)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    prompts = [Tokens(tuple(tokenizer(text).input_ids)) for text in texts]
    teacher = taught(llama, prompts)
    got = want = 0.0
    with torch.no_grad():
        for batch in batches(prompts, 256):
            got += teacher.divergence(other, batch).item()
            assert abs(teacher.divergence(llama, batch).item()) < 1e-3 * batch.tokens
        for prompt in prompts:
            ids = torch.tensor([prompt.ids])
            logs = [m(input_ids=ids).logits.log_softmax(-1) for m in (other, llama)]
            want += F.kl_div(*logs, reduction="sum", log_target=True).item()
    assert least * want < got < most * want


def test_the_same_steps_give_the_same_weights(tokenizer, texts):
    results = []
    for _ in range(2):
        model = tiny_model("llama").bfloat16()
        stats, plan = calibrated(model, tokenizer, texts)
        results.append(pk.prune(model, plan, stats=stats, compensate="distill", steps=5))
    pairs = zip(results[0].parameters(), results[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_decoders_matrices_move_and_all_else_stays(dtype, tokenizer, texts, monkeypatch):
    module = importlib.import_module("prunekit.compensate.distill")
    monkeypatch.setattr(module, "SHARES", (1.0,))  # all of the way, whatever it is worth
    model = tiny_model("llama_bias").to(dtype).train()
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    stats, plan = calibrated(model, tokenizer, texts)
    repaired = pk.prune(copy.deepcopy(model), plan, stats=stats, compensate="sequential")
    pk.prune(model, plan, stats=stats, compensate="distill", steps=3)
    before = dict(repaired.named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    want = {n for n, p in before.items() if ".layers." in n and p.dim() > 1}
    assert moved == want
    assert model.training
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]


def test_minutes_become_steps_by_the_time_of_the_first(llama, tokenizer, texts, monkeypatch):
    """A clock that moves by one second a step: one minute is 60 steps."""
    module = importlib.import_module("prunekit.compensate.distill")
    steps = []
    step = module._step
    monkeypatch.setattr(module, "_step", lambda *given: (steps.append(1), step(*given)))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(len(steps)))
    stats, plan = calibrated(llama, tokenizer, texts)
    pk.prune(llama, plan, stats=stats, compensate="distill", minutes=1)
    assert len(steps) == llama.prunekit["distill_steps"] == 60


def test_bad_budgets_and_statistics_are_refused_before_anything_changes(llama, tokenizer, texts):
    stats, plan = calibrated(llama, tokenizer, texts)
    before = copy.deepcopy(llama.state_dict())
    for budget, message in (
        ({"minutes": 0}, "minutes: got 0; expected a positive number"),
        ({"minutes": float("nan")}, "minutes: got nan; expected a positive number"),
        ({"steps": 0}, "steps: got 0; expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            pk.prune(llama, plan, stats=stats, compensate="distill", **budget)
    with pytest.raises(InputError, match="compensate distill: needs statistics"):
        pk.prune(llama, plan, compensate="distill")
    stats.prompts = None
    with pytest.raises(InputError, match="compensate distill: the statistics hold no prompts"):
        pk.prune(llama, plan, stats=stats, compensate="distill")
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())


def test_offloaded_weights_are_refused(llama, tokenizer, texts):
    stats, plan = calibrated(llama, tokenizer, texts)
    mlp = llama.model.layers[1].mlp
    mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight.to("meta"))
    with pytest.raises(InputError, match=r"compensate distill: .*mlp is offloaded or quantised"):
        pk.prune(llama, plan, stats=stats, compensate="distill")


def test_gradients_that_are_not_finite_are_one_line(llama, tokenizer, texts, monkeypatch):
    stats, plan = calibrated(llama, tokenizer, texts)
    broken = lambda self, model, batch: model(input_ids=batch.ids).logits.sum() * float("nan")  # noqa: E731
    monkeypatch.setattr(Teacher, "divergence", broken)
    with pytest.raises(InputError, match="got gradients with NaN or Inf"):
        pk.prune(llama, plan, stats=stats, compensate="distill", steps=1)
    assert all(p.grad is None for p in llama.parameters())


def test_training_that_helps_no_prompt_left_apart_is_taken_back(tokenizer, texts, monkeypatch):
    """A rate that ruins the model ends with the repair that it began from, bit for bit."""
    module = importlib.import_module("prunekit.compensate.distill")
    monkeypatch.setattr(module, "LEARNING_RATE", 1.0)
    dense = tiny_model("llama")
    stats, plan = calibrated(dense, tokenizer, texts)
    repaired, distilled = copy.deepcopy(dense), copy.deepcopy(dense)
    pk.prune(repaired, plan, stats=stats, compensate="sequential")
    pk.prune(distilled, plan, stats=stats, compensate="distill", steps=8)
    assert distilled.prunekit["distill_share"] == 0
    for a, b in zip(distilled.parameters(), repaired.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_share_kept_is_the_best_of_all_for_the_prompts_left_apart(
    tokenizer, many_texts, monkeypatch
):
    module = importlib.import_module("prunekit.compensate.distill")
    seen = {}
    place = module._place

    def watched(weights, start, end, share):
        place(weights, start, end, share)
        seen.setdefault(share, [weight.clone() for weight in weights])

    monkeypatch.setattr(module, "_place", watched)
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    stats, plan = calibrated(model, tokenizer, many_texts[:80])
    pk.prune(model, plan, stats=stats, compensate="distill", steps=20)
    apart = stats.prompts[module.APART // 2 :: module.APART]
    teacher = taught(dense, apart)
    weights = module.decoder_matrices(model, find_mlps(model))

    @torch.no_grad()
    def loss(values):
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
        said = (teacher.verdict(counted_logits(model, b), b) for b in batches(apart, 256))
        return sum(each.mixed for each in said)

    kept = model.prunekit["distill_share"]
    losses = {share: loss(values) for share, values in seen.items()}
    assert set(losses) == set(module.SHARES)
    assert min(losses, key=losses.get) == kept > 0


def test_a_token_counts_as_much_as_its_prompt_weighs(llama, tokenizer, texts):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    encoded = [Tokens(tuple(tokenizer(text).input_ids)) for text in texts[:6]]
    prompts = [replace(p, weight=w) for p, w in zip(encoded, (1, 0.25, 0, 1, 0.25, 0), strict=True)]
    (whole,) = batches(prompts, 10_000)
    teacher, plain = taught(llama, prompts), taught(llama, encoded)
    with torch.no_grad():
        got = teacher.divergence(other, whole).item()
        each = [plain.divergence(other, next(batches([p], 10_000))).item() for p in encoded]
    want = sum(p.weight * e for p, e in zip(prompts, each, strict=True))
    assert got == pytest.approx(want, rel=1e-4)


def test_a_verdict_is_of_completions_alone_and_of_both_targets(
    llama, tokenizer, texts, monkeypatch
):
    """Against each prompt by itself, without batches: the divergence and the loss, weighed."""
    monkeypatch.setattr(importlib.import_module("prunekit.compensate.teacher"), "TOP", 100)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    encoded = [Tokens(tuple(tokenizer(text).input_ids), 2) for text in texts if len(text) > 20][:6]
    weights = (1, 0.25, 0, 1, 0.25, 0)
    prompts = [replace(p, weight=w) for p, w in zip(encoded, weights, strict=True)]
    want = torch.zeros(3)
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            model, dense = (
                m(input_ids=ids).logits[0, 1:-1].log_softmax(-1) for m in (other, llama)
            )
        loss = F.nll_loss(model, ids[0, 2:], reduction="sum")
        divergence = F.kl_div(model, dense, reduction="sum", log_target=True)
        want += prompt.weight * torch.stack([divergence, loss, torch.tensor(ids.numel() - 2.0)])
    teacher = taught(llama, prompts)
    with torch.no_grad():
        said = [teacher.verdict(counted_logits(other, b), b) for b in batches(prompts, 64)]
    assert torch.tensor(said).sum(0).tolist() == pytest.approx(want.tolist(), rel=2e-3)
    assert said[0].mixed == said[0].divergence + said[0].loss


def test_the_repair_says_what_the_dense_model_says(architecture, tokenizer, texts):
    """Heard on the way, before anything is pruned away, are the dense model's own logits."""
    model = tiny_model(architecture)
    stats, plan = calibrated(model, tokenizer, texts)
    heard = {}

    def hear(batch, logits):
        for row, length, index in zip(logits, batch.lengths, batch.index, strict=True):
            heard[index] = row[:length].clone()

    sequential(model, find_mlps(model), plan.kept, stats, heard=hear, quiet=True)
    assert set(heard) == set(range(len(stats.prompts)))
    for index, prompt in enumerate(stats.prompts):
        with torch.no_grad():
            want = model(input_ids=torch.tensor([prompt.ids]), use_cache=False).logits[0]
        torch.testing.assert_close(heard[index], want, rtol=1e-3, atol=1e-4)
