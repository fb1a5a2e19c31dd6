"""Recovery lowers the loss, trains what it should and nothing else, and survives being stopped."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F

import prunekit as pk
from prunekit.backward import IGNORED
from prunekit.batching import Tokens
from prunekit.corpus import Corpus, Example
from prunekit.errors import InputError
from prunekit.evaluate import evaluate_loss
from prunekit.recover.data import ByLength, collate, training_tokens
from prunekit.recover.settings import PRESETS, resolve
from tests.models import logits, tiny_model

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def rows():
    """48 prompts with completions that can be learnt: each word is the one before plus 7."""
    examples = []
    for i in range(48):
        words = [f"w{(3 * i + 7 * j) % 90}" for j in range(4 + i % 5)]
        prompt = " ".join(words[:2]) + " "
        examples.append(Example(prompt + " ".join(words[2:]), len(prompt)))
    return Corpus("rows", tuple(examples))


def damaged(model):
    """A copy, away from where it was."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".layers." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return other


def uneven(model, tokenizer, texts):
    """The model pruned to widths that differ by layer."""
    kept = tuple(torch.arange(k, dtype=torch.int32) for k in (40, 72))
    return pk.prune(model, pk.PrunePlan(kept, (96, 96)))


def recover(model, tokenizer, rows, method, **options):
    rate = {"lora": 1e-2, "full": 3e-3, "distill": 3e-3}[method]
    options = {"steps": 12, "learning_rate": rate, "dtype": "fp32", "warmup": 0.0} | options
    return pk.recover(model, tokenizer, rows, method=method, **options)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_training_lowers_the_loss_on_the_completions(name, method, tokenizer, rows):
    model = tiny_model(name)
    before = evaluate_loss(model, tokenizer, rows, quiet=True).loss
    assert recover(model, tokenizer, rows, method) is model
    after = evaluate_loss(model, tokenizer, rows, quiet=True).loss
    facts = model.prunekit["recovery"]
    assert after < before - 0.2
    assert facts["loss"]["before"] == before
    assert facts["loss"]["after"] == after
    assert facts["data"]["hash"] == rows.hash
    assert facts["steps"] == len(model.prunekit["curve"]) == 12
    assert model.prunekit["curve"][-1]["loss"] < model.prunekit["curve"][0]["loss"]
    assert not model.training


@torch.no_grad()
def divergence_on(rows, tokenizer, dense, model):
    """KL(dense ‖ model) a token, over the whole vocabulary."""
    total = 0.0
    for example in rows.examples:
        ids = torch.tensor([tokenizer(example.text).input_ids])
        got, want = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, dense))
        total += F.kl_div(got, want, reduction="batchmean", log_target=True).item()
    return total


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 1)], ids=["logits", "hidden", "both"])
def test_distillation_brings_a_model_closer_to_its_teacher(weights, llama, tokenizer, rows):
    model = damaged(llama)
    teacher = {k: v.clone() for k, v in llama.state_dict().items()}
    before = divergence_on(rows, tokenizer, llama, model)
    given = dict(zip(("logits_weight", "hidden_weight"), map(float, weights), strict=True))
    recover(model, tokenizer, rows, "distill", teacher=llama, batch=48, **given)
    assert divergence_on(rows, tokenizer, llama, model) < 0.7 * before
    assert all(torch.equal(teacher[k], v) for k, v in llama.state_dict().items())
    assert model.prunekit["curve"][-1]["loss"] < 0.8 * model.prunekit["curve"][0]["loss"]


def test_a_model_that_is_its_teacher_has_nothing_to_learn(llama, tokenizer, rows):
    model = copy.deepcopy(llama)
    recover(model, tokenizer, rows, "distill", teacher=llama, steps=1)
    assert abs(model.prunekit["curve"][0]["loss"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "full", "distill"])
def test_only_what_should_train_moves_and_all_else_stays(method, dtype, tokenizer, rows):
    dense = tiny_model("llama").to(dtype)
    model = damaged(dense)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.named_parameters()}
    teacher = {"teacher": dense} if method == "distill" else {}
    recover(model, tokenizer, rows, method, steps=3, **teacher)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    matrices = {n for n in before if n.split(".")[-2] in SEVEN}
    want = matrices if method != "full" else set(before)
    if dtype == torch.bfloat16:  # three small steps do not move every norm by what bf16 can tell
        assert matrices <= moved <= want
    else:
        assert moved == want
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]


def test_a_merged_adapter_gives_what_the_adapter_gives(tmp_path, llama, tokenizer, rows):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(llama)
    recover(llama, tokenizer, rows, "lora", keep_adapter=tmp_path / "adapter", dropout=0.1)
    assert type(llama).__name__ == "LlamaForCausalLM"
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert {n.split(".")[-1] for n in adapted.peft_config["default"].target_modules} == SEVEN
    with torch.no_grad():
        assert (logits(base) - logits(llama)).abs().max() > 0.1
        torch.testing.assert_close(logits(adapted), logits(llama), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full", "distill"])
def test_widths_that_differ_by_layer_are_recovered_on_the_live_model(
    method, llama, tokenizer, texts, rows
):
    dense = copy.deepcopy(llama)
    model = uneven(llama, tokenizer, texts)
    plan = model.prunekit["plan"]
    teacher = {"teacher": dense} if method == "distill" else {}
    recover(model, tokenizer, rows, method, batch=48, **teacher)
    assert [v.width for v in pk.find_mlps(model)] == [40, 72]
    assert model.prunekit["plan"] is plan
    assert model.prunekit["curve"][-1]["loss"] < 0.9 * model.prunekit["curve"][0]["loss"]


@pytest.mark.parametrize("method", ["lora", "full", "distill"])
def test_a_stopped_run_goes_on_to_the_same_weights(method, tmp_path, tokenizer, rows, monkeypatch):
    """Stopped within the second epoch, one step after a checkpoint, and between two."""
    from prunekit.recover.trainer import Recovery

    dense = tiny_model("llama")
    teacher = {"teacher": dense} if method == "distill" else {}
    given = {"steps": None, "epochs": 3.0, "batch": 4, "accumulation": 3, "dropout": 0.1, **teacher}
    if method != "lora":
        given.pop("dropout")
    want = recover(damaged(dense), tokenizer, rows, method, **given)
    given |= {"folder": tmp_path / "run", "save_every": 3}
    step = Recovery.training_step

    def until(last):
        def training_step(self, *rest):
            if self.state.global_step == last:
                raise KeyboardInterrupt
            return step(self, *rest)

        return training_step

    for last in (1, 5, 7):
        monkeypatch.setattr(Recovery, "training_step", until(last))
        with pytest.raises(KeyboardInterrupt):
            recover(damaged(dense), tokenizer, rows, method, resume=last > 1, **given)
    half = tmp_path / "run" / "checkpoint-9"  # as a kill leaves it
    half.mkdir()
    monkeypatch.setattr(Recovery, "training_step", step)
    got = recover(damaged(dense), tokenizer, rows, method, resume=True, **given)
    pairs = zip(want.parameters(), got.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert want.prunekit["curve"] == got.prunekit["curve"]
    assert len(want.prunekit["curve"]) == 12


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_ended_is_not_trained_further(method, tmp_path, tokenizer, rows):
    given = {"steps": 2, "folder": tmp_path / "run"}
    first, again = (
        recover(tiny_model("llama"), tokenizer, rows, method, resume=resume, **given)
        for resume in (False, True)
    )
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.prunekit["curve"] == again.prunekit["curve"]


def test_a_folder_of_another_run_is_refused(tmp_path, llama, tokenizer, rows):
    given = {"steps": 2, "save_every": 1, "folder": tmp_path / "run"}
    recover(copy.deepcopy(llama), tokenizer, rows, "full", **given)
    with pytest.raises(InputError, match="holds a run already; resume it, or remove it"):
        recover(llama, tokenizer, rows, "full", **given)
    with pytest.raises(InputError, match=r"begun otherwise: seed 1 \(was 0\)"):
        recover(llama, tokenizer, rows, "full", resume=True, seed=1, **given)


def test_a_failure_leaves_no_adapter_behind(llama, tokenizer, rows, monkeypatch):
    from prunekit.recover.objective import NextToken

    before = copy.deepcopy(llama.state_dict())
    broken = lambda self, model, ids, labels: model(input_ids=ids).logits.sum() * float("nan")  # noqa: E731
    monkeypatch.setattr(NextToken, "__call__", broken)
    with pytest.raises(InputError, match="got a loss or gradient with NaN or Inf at step 1"):
        recover(llama, tokenizer, rows, "lora")
    after = llama.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in llama.parameters())


def test_lora_without_peft_says_how_to_get_it(llama, tokenizer, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs the package peft; pip install 'prunekit\[rec"):
        pk.recover(llama, tokenizer, rows)
    assert all(p.requires_grad for p in llama.parameters())


def test_accumulation_weighs_every_token_alike(tokenizer, rows):
    """Two batches of 8 accumulated step as one batch of 16, though their completions differ."""
    models = []
    for batch, accumulation in ((16, 1), (8, 2)):
        model = tiny_model("llama")
        corpus = Corpus("some", rows.examples[:16])
        given = {"batch": batch, "accumulation": accumulation, "steps": 1}
        models.append(recover(model, tokenizer, corpus, "full", **given))
    one, two = (m.prunekit["curve"][0] for m in models)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_labels_are_the_completion_and_the_end(tokenizer):
    corpus = Corpus("c", (Example("w1 w2 w3 w4", 6), Example("w5 w6")))
    prompts = training_tokens(corpus, tokenizer, 8)
    assert prompts == [Tokens((4, 5, 6, 7, 2), 2), Tokens((8, 9, 2), 0)]
    batch = collate(prompts)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 2], [8, 9, 2, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 6, 7, 2],
        [IGNORED, 9, 2, IGNORED, IGNORED],
    ]
    assert training_tokens(corpus, tokenizer, 4)[0] == Tokens((4, 5, 6, 7), 2)
    with pytest.raises(InputError, match="no example has a token to learn within 1 tokens"):
        training_tokens(corpus, tokenizer, 1)


def test_an_epoch_has_every_example_once_in_full_batches_of_like_length():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (1000,), generator=draw).tolist()
    prompts = [Tokens((1,) * n) for n in lengths]
    order = ByLength(prompts, 8, 0)
    first = list(order)
    order.set_epoch(1)
    assert sorted(first) == list(range(1000))
    assert list(order) != first
    batches = [[lengths[i] for i in first[k : k + 8]] for k in range(0, 1000, 8)]
    padded = sum(len(b) * max(b) for b in batches)
    assert padded < 1.06 * sum(lengths)
    assert len({max(b) for b in batches[:20]}) > 5  # short and long ones mixed


def test_padding_takes_few_shapes_and_little_room():
    shapes = {n: collate([Tokens((1,) * n)])["input_ids"].shape[1] for n in range(2, 1025)}
    assert all(n <= shape < 1.13 * n for n, shape in shapes.items())
    assert len(set(shapes.values())) < 70


def test_presets_are_the_papers():
    common = {"method": "lora", "rank": 16, "alpha": 32, "max_length": 1024, "dtype": "bf16"}
    math = common | {"epochs": 3, "learning_rate": 2e-5, "dropout": 0.1}
    code = common | {"epochs": 2, "learning_rate": 2e-4, "dropout": 0.05, "limit": 7000}
    assert PRESETS["paper-math"] == math | {"batch": 2, "accumulation": 4}
    assert PRESETS["paper-code"] == code | {"batch": 2, "accumulation": 8}
    assert resolve("paper-math", epochs=1.0).epochs == 1
    assert resolve("paper-math", epochs=None).learning_rate == 2e-5
    assert resolve(method="distill").learning_rate == 3e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "paper-poems"}, "preset: got 'paper-poems'; expected one of paper-math, pap"),
        ({"method": "magic"}, "method: got 'magic'; expected one of lora, full, distill"),
        ({"method": "distill"}, "method distill: needs the dense model as its teacher"),
        ({"teacher": "OTHER"}, "method lora: takes no teacher; use distill"),
        ({"method": "distill", "teacher": "OTHER"}, "got vocab_size 90, expected the model's 100"),
        ({"method": "full", "keep_adapter": "a"}, "method full has no adapter; use lora"),
        ({"epochs": 0.0}, "epochs: got 0.0; expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan; expected more than 0"),
        ({"dropout": 1.0}, "dropout: got 1.0; expected a share"),
        ({"resume": True}, "resume: needs the folder of the checkpoints"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(options, message, llama, tokenizer, rows):
    before = copy.deepcopy(llama.state_dict())
    if "teacher" in options:
        options = options | {"teacher": tiny_model("llama", vocab_size=90)}
    with pytest.raises(InputError, match=message) as refusal:
        pk.recover(llama, tokenizer, rows, **options)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())


def test_the_record_is_json(llama, tokenizer, rows):
    recover(llama, tokenizer, rows, "full", steps=1)
    json.dumps(llama.prunekit["recovery"])
