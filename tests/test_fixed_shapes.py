"""A model behind a cache of fixed length reads and decodes what it always does."""

import pytest
import torch

from prunekit.compact import compact_modules
from prunekit.errors import InputError
from prunekit.integrations.fixed_shapes import EAGER, FixedShapes, Way
from prunekit.measure.comparison import bench_models, cases_of
from tests.models import tiny_model

NAMES = ("llama", "gemma2", "mistral", "gpt2", "opt", "mixtral")
PROMPT, GENERATE = 12, 9


def prompts(batch=2):
    return torch.randint(0, 100, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


def generated(model, ids):
    """What transformers decodes greedily, ends of text ignored."""
    options = {"max_new_tokens": GENERATE, "min_new_tokens": GENERATE, "do_sample": False}
    return model.generate(ids, pad_token_id=0, **options)[:, PROMPT:]


def decoded(step, first):
    tokens = [first]
    while len(tokens) < GENERATE:
        tokens.append(step(tokens[-1]))
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_it_decodes_what_transformers_generates_and_can_begin_again(name):
    model = tiny_model(name)
    want = generated(model, prompts())
    step = FixedShapes(model, PROMPT + GENERATE, EAGER)
    first = step.read(prompts())
    for _ in range(2):
        assert torch.equal(decoded(step, first), want)
        step.forget(GENERATE - 1)
    step.forget(PROMPT)
    assert torch.equal(step(prompts()), want[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
def test_compiled_it_decodes_the_same(llama, compact):
    want = generated(llama, prompts())
    model = compact_modules(llama) if compact else llama
    step = FixedShapes(model, PROMPT + GENERATE, Way(compile=True))
    assert torch.equal(decoded(step, step.read(prompts())), want)


@pytest.mark.slow
def test_compiled_models_have_their_bounds(llama):
    """More of them than torch.compile would make of one function by itself."""
    models = {"dense": llama}
    models |= {f"{w}": tiny_model("llama", intermediate_size=w) for w in (16, 24, 32, 40)}
    options = {"prompt": 8, "generate": 2, "rounds": 1, "explain": True}
    rows = bench_models(models, way=Way(compile=True), **options)
    assert {row.engine for row in rows} == {"transformers, compiled"}
    for row in rows:
        assert (row.parts.attention, row.parts.head) == (0, 0)
        assert (row.bound is None) == (row.model == "dense")


def test_a_bound_without_hooks_comes_from_runs_without_mlps(llama, monkeypatch):
    """As in a compiled model, with nothing compiled: what is left out, and that it comes back."""
    monkeypatch.setattr(FixedShapes, "_prepared", lambda self, ids: self._forward)
    seen = []
    mlp = llama.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, x, y: seen.append(bool(y.any())))
    models = {"dense": llama, "small": tiny_model("llama", intermediate_size=32)}
    options = {"prompt": 8, "generate": 2, "rounds": 1, "explain": True}
    rows = bench_models(models, way=Way(compile=True), **options)
    assert set(seen) == {True, False}
    assert [row.model for row in rows if row.bound] == ["small", "small"]
    llama(prompts())
    assert seen[-1]


@pytest.mark.skipif("torch.cuda.is_available()", reason="there is a GPU")
def test_a_cuda_graph_needs_a_gpu(llama):
    with pytest.raises(InputError, match="--cuda-graph: torch sees no NVIDIA GPU"):
        cases_of({"m": llama}, 4, 2, [1], Way(cuda_graph=True))


@pytest.mark.skipif("not torch.cuda.is_available()", reason="needs a GPU")
@pytest.mark.parametrize("way", [Way(cuda_graph=True), Way(compile=True, cuda_graph=True)])
def test_a_cuda_graph_decodes_the_same(way):
    model = tiny_model("llama").cuda()
    ids = prompts().cuda()
    want = generated(model, ids)
    step = FixedShapes(model, PROMPT + GENERATE, way)
    first = step.read(ids)
    for _ in range(2):
        assert torch.equal(decoded(step, first), want)
        step.forget(GENERATE - 1)
