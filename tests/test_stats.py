"""Statistics equal fp64 arithmetic over stored activations, and survive every journey."""

import pytest
import torch

import prunekit as pk
from prunekit import files, ops
from prunekit.arch import find_mlps
from prunekit.errors import InputError
from prunekit.evaluate import evaluate_loss
from prunekit.stats import NeuronStats, NeuronSums
from tests.models import tiny_model
from tests.same import assert_same


def h_of_each_prompt(model, tokenizer, texts):
    """[prompts][mlps] of h [tokens, F] in fp64, gathered by hooks on the down projections."""
    seen = []
    views = find_mlps(model)
    handles = [
        v.down_owner.register_forward_pre_hook(lambda _, args: seen[-1].append(args[0].double()))
        for v in views
    ]
    for text in texts:
        seen.append([])
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(text).input_ids]))
    for handle in handles:
        handle.remove()
    return [[h.reshape(-1, h.shape[-1]) for h in mlps] for mlps in seen]


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4000])
def test_every_statistic_equals_fp64(name, batch_tokens, tokenizer, texts):
    model = tiny_model(name)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, batch_tokens=batch_tokens, quiet=True)
    prompts = h_of_each_prompt(model, tokenizer, texts)
    for i, sums in enumerate(stats.target):
        tokens = torch.cat([p[i] for p in prompts])
        a = torch.stack([p[i].abs().mean(0) for p in prompts])
        close = {"rtol": 1e-5, "atol": 1e-6}
        assert (sums.prompts, sums.tokens) == (len(texts), len(tokens))
        torch.testing.assert_close(sums.prompt_sum, a.sum(0), **close)
        torch.testing.assert_close(sums.prompt_square_sum, a.square().sum(0), **close)
        norms = torch.stack([p[i].norm(dim=0) for p in prompts]).sum(0)
        torch.testing.assert_close(sums.prompt_norm_sum, norms, **close)
        torch.testing.assert_close(sums.token_sum, tokens.sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.token_abs_sum, tokens.abs().sum(0), **close)
        torch.testing.assert_close(sums.token_square_sum, tokens.square().sum(0), **close)
        torch.testing.assert_close(sums.max_abs.double(), tokens.abs().amax(0), **close)
        torch.testing.assert_close(sums.gram.double(), tokens.T @ tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 33, 500, 4000])
def test_selectivity_equals_fp64_whatever_the_batch_size(batch_tokens, llama, tokenizer, texts):
    target, distractor = texts[:25], texts[25:]
    stats = pk.calibrate(
        llama, tokenizer, target, [distractor], batch_tokens=batch_tokens, quiet=True
    )
    found = pk.score(stats, llama, "selectivity")
    prompts = h_of_each_prompt(llama, tokenizer, texts)
    for i, scores in enumerate(found):
        a = torch.stack([p[i].abs().mean(0) for p in prompts])
        expected = (a[:25].mean(0) - a[25:].mean(0)) / (a.std(0, correction=0) + 1e-6)
        error = (scores.double() - expected).abs() / expected.abs().max()
        assert error.max() < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_an_expert_counts_only_the_tokens_it_saw(name, tokenizer, texts):
    model = tiny_model(name)
    views = find_mlps(model)
    stats = pk.calibrate(model, tokenizer, texts, gram=True, batch_tokens=100, quiet=True)
    total = sum(len(tokenizer(text).input_ids) for text in texts)
    chosen = model.config.num_experts_per_tok
    for layer in (0, 1):
        experts = [
            s
            for v, s in zip(views, stats.target, strict=True)
            if v.kind == "experts" and v.layer == layer
        ]
        assert sum(s.tokens for s in experts) == chosen * total
        assert all(0 < s.prompts <= len(texts) for s in experts)
    for view, sums in zip(views, stats.target, strict=True):
        expected = sums.gram.diagonal().double()
        torch.testing.assert_close(sums.token_square_sum, expected, rtol=1e-4, atol=1e-6)
        assert (sums.max_abs > 0).all(), view.name


def test_an_experts_norm_is_taken_over_each_prompts_tokens(tokenizer, texts):
    """Prompt by prompt the norm is the root of the sum of squares; together they add up."""
    model = tiny_model("qwen2_moe")
    whole = pk.calibrate(model, tokenizer, texts[:12], batch_tokens=60, quiet=True).target
    singly = [pk.calibrate(model, tokenizer, [text], quiet=True).target for text in texts[:12]]
    for i, sums in enumerate(whole):
        norms = torch.stack([one[i].token_square_sum.sqrt() for one in singly])
        torch.testing.assert_close(sums.prompt_norm_sum, norms.sum(0), rtol=1e-5, atol=1e-6)


def test_calibration_leaves_the_model_as_it_was(architecture, tokenizer, texts):
    model = tiny_model(architecture)
    ids = torch.tensor([tokenizer(texts[3]).input_ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    pk.calibrate(model, tokenizer, texts[:5], quiet=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_model_computes_while_observed_what_it_always_computes(architecture, tokenizer, texts):
    """The hidden states of an observed forward equal the plain ones, experts included."""
    from prunekit.batching import batches, encode
    from prunekit.calibrate import forward_decoder
    from prunekit.corpus import from_texts
    from prunekit.observe import observed

    model = tiny_model(architecture)
    views = find_mlps(model)
    batch = next(iter(batches(encode(from_texts(texts), tokenizer, 64), 200)))

    def tap(index, gate, up, rows):
        tokens = torch.zeros(0, 2, dtype=torch.int64)
        return ops.gated_act_stats(gate, up, tokens, views[index].act)[0]

    plain = forward_decoder(model, batch)
    with observed(views, tap):
        tapped = forward_decoder(model, batch)
    torch.testing.assert_close(tapped, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_model_whose_weights_accelerate_holds_elsewhere_gives_the_same(name, tokenizer, texts):
    from accelerate import cpu_offload

    want = pk.calibrate(
        tiny_model(name), tokenizer, texts[:9], [texts[9:15]], gram=True, quiet=True
    )
    model = cpu_offload(tiny_model(name), execution_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    dense = evaluate_loss(tiny_model(name), tokenizer, texts[:5], quiet=True)
    assert evaluate_loss(model, tokenizer, texts[:5], quiet=True) == dense
    got = pk.calibrate(model, tokenizer, texts[:9], [texts[9:15]], gram=True, quiet=True)
    assert_same(got, want)


def test_offloaded_experts_are_refused(tokenizer, texts):
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model("mixtral"), execution_device="cpu")
    with pytest.raises(InputError, match="offloaded experts cannot be observed"):
        pk.calibrate(model, tokenizer, texts[:2], quiet=True)


def test_merging_two_halves_gives_the_whole(llama, tokenizer, texts):
    whole = pk.calibrate(llama, tokenizer, texts, [texts[:9]], gram=True, quiet=True)
    first = pk.calibrate(llama, tokenizer, texts[:20], [texts[:9]], gram=True, quiet=True)
    second = pk.calibrate(llama, tokenizer, texts[20:], gram=True, quiet=True)
    both = first.merge(second)
    assert both.provenance["merged"] == [first.provenance, second.provenance]
    for a, b in zip(both.target, whole.target, strict=True):
        assert (a.prompts, a.tokens) == (b.prompts, b.tokens)
        torch.testing.assert_close(a.prompt_square_sum, b.prompt_square_sum, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-5)
    pruned = tiny_model("llama", intermediate_size=64)
    other = pk.calibrate(pruned, tokenizer, texts, quiet=True)
    with pytest.raises(InputError, match="two different models"):
        whole.merge(other)


def test_statistics_survive_the_disk_bit_for_bit(tmp_path, llama, tokenizer, texts):
    stats = pk.calibrate(llama, tokenizer, texts, [texts[:7]], gram=True, quiet=True)
    stats.save(tmp_path / "s.safetensors")
    again = NeuronStats.load(tmp_path / "s.safetensors")
    assert again.hash == stats.hash
    assert_same(stats, again)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_file_from_before_the_prompt_norms_is_read_without_them(tmp_path, llama, tokenizer):
    path = tmp_path / "s.safetensors"
    pk.calibrate(llama, tokenizer, ["w1 w2 w3"], quiet=True).save(path)
    tensors, header = files.read_tensors(path, "neuron-stats")
    older = {name: t for name, t in tensors.items() if not name.endswith("prompt_norm_sum")}
    header = {key: value for key, value in header.items() if key not in ("kind", "version")}
    files.write_tensors(path, older, "neuron-stats", header)
    stats = NeuronStats.load(path)
    assert all(sums.prompt_norm_sum is None for sums in stats.target)
    pk.score(stats, llama, "wanda")
    both = stats.merge(pk.calibrate(llama, tokenizer, ["w4 w5"], quiet=True))
    for part in (stats, both):
        with pytest.raises(InputError, match=r"two_stage: .* no prompt_norm_sum; .*calibrate"):
            pk.score(part, llama, "two_stage")


def test_a_file_that_is_cut_short_or_of_another_kind_is_refused(tmp_path, llama, tokenizer, texts):
    path = tmp_path / "s.safetensors"
    pk.calibrate(llama, tokenizer, texts, quiet=True).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="no whole safetensors file"):
            NeuronStats.load(path)
    with pytest.raises(InputError, match="no such file"):
        NeuronStats.load(tmp_path / "missing")
    pk.plan([torch.rand(96)], 0.5, multiple_of=1).save(path)
    with pytest.raises(InputError, match="is prune-plan version 1, expected neuron-stats"):
        NeuronStats.load(path)


def test_statistics_do_not_grow_with_the_number_of_prompts(llama, tokenizer):
    def numbers(count):
        texts = [f"w{i % 90} w{(i * 7) % 90}" for i in range(count)]
        stats = pk.calibrate(llama, tokenizer, texts, quiet=True)
        vectors = [t for s in stats.target for t in vars(s).values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in vectors)

    assert numbers(10) == numbers(1000)


def test_nan_weights_are_named_by_mlp_and_neuron(llama, tokenizer, texts):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[5] = float("nan")
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp: the up weights of neuron 5 are not finite"
    ):
        pk.calibrate(llama, tokenizer, texts, quiet=True)


def test_an_empty_prompt_counts_as_none():
    sums = NeuronSums.zeros(3, "cpu")
    prompt_stats = torch.tensor([[[2.0, 4, 6], [0, 0, 0]], [[2.25, 9, 20.25], [0, 0, 0]]])
    token_stats = torch.tensor([[2.0, -4, 6], [2.0, 4, 6], [1.0, 0, 1]])
    sums.add(prompt_stats, token_stats, [2, 0])
    assert (sums.prompts, sums.tokens) == (1, 2)
    assert sums.prompt_mean.tolist() == [1, 2, 3]
    assert sums.prompt_norm_sum.tolist() == [1.5, 3, 4.5]
