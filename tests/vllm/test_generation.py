"""vLLM continues prompts greedily as transformers does, whatever the widths of the MLPs."""

import itertools

import pytest
import torch

import prunekit as pk
from bench.agreement import greedy, shortfalls
from bench.vllm_bf16 import cut_off, explained, nearest, vllm_rounds
from prunekit.arch import find_mlps
from prunekit.checkpoint.widths import DECODER_LAYERS
from prunekit.plan import PrunePlan
from tests.vllm.models import dense, even, uneven

TOKENS = 32
PROMPTS = [[5, 6, 7, 9], [20, 21, 22, 23, 24, 25, 26], [40]]
TEXTS = [
    "def fibonacci(n):\n",
    "The capital of France is",
    "Write a function to find the largest number in a list.\n",
]


def widths_of(model):
    return [view.width for view in find_mlps(model)]


def check(vllm, model, folder, **options):
    """vLLM builds the model's widths and continues as it does, token for token in fp32."""
    pk.save(model, None, folder)
    vllm.load(str(folder), dtype="float32", skip_tokenizer_init=True, **options)
    assert vllm.widths() == widths_of(model)
    assert vllm.continues(PROMPTS, TOKENS) == greedy(model, PROMPTS, TOKENS)


@pytest.mark.parametrize("model_type", sorted(DECODER_LAYERS))
def test_widths_that_differ_by_layer(model_type, tmp_path, vllm):
    model = uneven(model_type)
    assert len(set(widths_of(model))) == 2
    check(vllm, model, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_widths_that_differ_through_the_transformers_backend(model_type, tmp_path, vllm):
    check(vllm, uneven(model_type), tmp_path / "out", model_impl="transformers")


@pytest.mark.parametrize("make", [dense, even])
def test_one_width_with_the_plugin_and_without(make, tmp_path, vllm, vllm_without_plugins):
    check(vllm, make(), tmp_path / "out")
    check(vllm_without_plugins, make(), tmp_path / "again")


def test_without_the_plugin_several_widths_are_refused(tmp_path, vllm_without_plugins):
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute"):
        check(vllm_without_plugins, uneven(), tmp_path / "out")


def keep(model, tokenizer, widths):
    """The model with so many neurons a layer, chosen and repaired for the texts themselves."""
    stats = pk.calibrate(model, tokenizer, TEXTS, gram=True)
    scores = pk.score(stats, model, "wanda")
    kept = [s.topk(w).indices.sort().values.int() for s, w in zip(scores, widths, strict=False)]
    plan = PrunePlan(tuple(kept), tuple(widths_of(model)))
    return pk.prune(model, plan, stats=stats, compensate="lstsq")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(1216,), (1472, 960)], ids=["20 percent", "differing"])
def test_the_demo_model(widths, dtype, tmp_path, vllm, demo_model):
    _, tokenizer = demo_model
    model = keep(pk.load("demo", device="cpu"), tokenizer, itertools.cycle(widths))
    pk.save(model, tokenizer, tmp_path / "out")
    vllm.load(str(tmp_path / "out"), dtype=dtype)
    assert vllm.widths() == widths_of(model)
    assert set(vllm.widths()) == set(widths)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    found = vllm.continues(prompts, TOKENS)
    if dtype == "float32":
        assert found == greedy(model.float(), prompts, TOKENS)
    else:
        model = model.float()
        lost = [shortfalls(model, p, c) for p, c in zip(prompts, found, strict=True)]
        assert max(max(each) for each in lost) <= explained(model, prompts, TOKENS)


def test_how_bf16_is_left_on_this_cpu(vllm):
    """vLLM's kernel leaves what the emulation says; by the other way half of it would differ."""
    gate, up = torch.randn(2, 64, 512).bfloat16()
    left = vllm.silu_and_mul(torch.cat([gate, up], 1))
    exact = (torch.nn.functional.silu(gate.double()) * up.double()).float()
    other = cut_off if vllm_rounds() is nearest else nearest
    assert (left.float() == vllm_rounds()(exact)).float().mean() > 0.99
    assert (left.float() == other(exact)).float().mean() < 0.7
