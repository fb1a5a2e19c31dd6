"""GGUF files: written, read again by transformers and by prunekit, and refused."""

import json
import random

import gguf
import numpy as np
import pytest
import torch

import prunekit as pk
from prunekit.arch import find_mlps
from prunekit.checkpoint.gguf import save_gguf
from prunekit.checkpoint.gguf_layout import frequency_factors
from prunekit.checkpoint.gguf_read import read_gguf
from prunekit.checkpoint.gguf_vocab import PRE_TOKENIZERS
from prunekit.checkpoint.padded import pad
from prunekit.cli import main
from prunekit.errors import InputError
from prunekit.integrations.gguf import llama3_scaling
from prunekit.integrations.loading import load_shape, load_tokenizer
from prunekit.plan import PrunePlan
from tests.models import logits, tiny_model
from tests.vocabularies import TEXTS, byte_level, sentencepiece

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What a model may have beside the plain layout, and what reads it back: transformers, or only we.
MODELS = {
    "llama": ("llama", {}, True),
    "tied": ("llama", {"tie_word_embeddings": True}, True),
    "mistral": ("mistral", {}, True),
    "qwen2": ("qwen2", {}, True),
    "qwen3": ("qwen3", {"head_dim": 128}, True),
    "qwen3, small heads": ("qwen3", {}, False),
    "biases": ("llama_bias", {"attention_bias": True}, False),
    "wide heads": ("llama", {"head_dim": 16}, True),
    "linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        False,
    ),
    "llama 3's rope": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}, False),
}


@pytest.fixture(scope="module")
def words():
    return byte_level("qwen2", 400)


def made(name, words, **more):
    kind, options, theirs = MODELS[name]
    return tiny_model(kind, vocab_size=len(words) + 3, **(options | more)), theirs


@pytest.fixture
def small(words, tmp_path):
    """A tiny Llama, saved as a folder, and as a GGUF file of f32."""
    model, _ = made("llama", words)
    pk.save(model, words, tmp_path / "folder")
    save_gguf(model, words, tmp_path / "m.gguf", "f32")
    return tmp_path


@pytest.mark.parametrize("outtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_the_model_computed(name, outtype, words, tmp_path):
    """Weights that the type can say come back bit for bit, so the logits do too."""
    model, theirs = made(name, words)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[outtype]).float()
    path = save_gguf(model, words, tmp_path / "m.gguf", outtype)
    again = pk.load(path, dtype="fp32")
    assert torch.equal(logits(again), logits(model))
    assert pk.load(path).dtype == DTYPES[outtype]
    assert read_gguf(path).types.keys() == {outtype, "f32"}
    if theirs:
        from transformers import AutoModelForCausalLM

        options = {"gguf_file": "m.gguf", "dtype": torch.float32}
        read = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
        assert torch.equal(logits(read), logits(model))


def test_what_transformers_would_drop_is_in_the_configuration(words, tmp_path):
    model, _ = made("biases", words)
    again = pk.load(save_gguf(model, words, tmp_path / "m.gguf", "f32"))
    for key in ("attention_bias", "mlp_bias", "head_dim", "rope_parameters", "eos_token_id"):
        expected = words.eos_token_id if key == "eos_token_id" else getattr(model.config, key)
        assert getattr(again.config, key) == expected, key


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_its_factors(size, factor):
    said = LLAMA3 | {"factor": factor}
    factors = frequency_factors(said, size)
    assert factors.min() == 1
    assert factors.max() == factor
    assert llama3_scaling(factors, said["rope_theta"], "f") | {"rope_theta": 500000.0} == said
    bent = factors.clone()
    bent[size // 4] *= 1.5
    with pytest.raises(InputError, match="none that Llama 3's rotary scaling makes"):
        llama3_scaling(bent, said["rope_theta"], "f")


def test_the_factors_are_those_of_transformers(words):
    model, _ = made("llama 3's rope", words)
    plain, _ = made("llama", words, head_dim=64)
    theirs = model.model.rotary_emb.inv_freq
    plain.model.rotary_emb.inv_freq.copy_(500000.0 ** (-torch.arange(0, 64, 2) / 64))
    ours = plain.model.rotary_emb.inv_freq / frequency_factors(LLAMA3, 64)
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_q8_0_is_ggmls_own_and_rows_that_do_not_divide_are_f16(words, tmp_path):
    model, _ = made("llama", words, intermediate_size=72)
    file = read_gguf(save_gguf(model, words, tmp_path / "m.gguf", "q8_0"))
    kinds = {name: gguf.GGMLQuantizationType(t.kind).name for name, t in file.tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # 72 wide
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
    dense = model.model.layers[0].mlp.up_proj.weight.detach()
    quantised = gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(file.read("blk.0.ffn_up.weight").numpy(), expected)
    scale = dense.view(-1, 32).abs().amax(1, keepdim=True) / 127
    error = (file.read("blk.0.ffn_up.weight") - dense).view(-1, 32).abs()
    assert (error <= scale * 0.57).all()  # half a step, and the scale's own rounding to f16


@pytest.mark.parametrize(
    ("name", "options", "context"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, 64),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 64),
    ],
)
def test_the_context_is_what_a_sliding_window_sees(name, options, context, words, tmp_path):
    model, _ = made(name, words, **options)
    assert read_gguf(save_gguf(model, words, tmp_path / "m.gguf")).get("context_length") == context
    model.save_pretrained(tmp_path / "folder")
    words.save_pretrained(tmp_path / "folder")
    output = str(tmp_path / "n.gguf")
    assert main(["export", str(tmp_path / "folder"), "--format", "gguf", "-o", output]) == 0


def test_tied_embeddings_are_written_once(words, tmp_path):
    model, _ = made("tied", words)
    path = save_gguf(model, words, tmp_path / "m.gguf")
    assert "output.weight" not in read_gguf(path).tensors
    again = pk.load(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece"])
def test_tokenizer_and_chat_template_come_back(name, begins, tmp_path):
    if name == "sentencepiece":
        tokenizer = sentencepiece(metaspace=True, begins=begins)
    else:
        tokenizer = byte_level(name, begins=begins)
    model = tiny_model("llama", vocab_size=len(tokenizer) + 5)
    path = save_gguf(model, tokenizer, tmp_path / "m.gguf")
    keys = read_gguf(path).keys
    assert keys["tokenizer.ggml.add_bos_token"] is begins
    assert keys["tokenizer.ggml.pre"] == ("default" if name == "sentencepiece" else name)
    assert keys["tokenizer.ggml.token_type"][-6:] == [4, 5, 5, 5, 5, 5]  # <tool>, and no tokens
    again = load_tokenizer(str(path))
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    chat = [{"role": "user", "content": "12  34"}]
    said = [t.apply_chat_template(chat, tokenize=False) for t in (tokenizer, again)]
    assert said[0] == said[1]
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert all(getattr(again, s) == getattr(tokenizer, s) for s in special)


def uneven(words, name):
    model, _ = made(name, words)
    dense = [view.width for view in find_mlps(model)]
    kept = (torch.arange(0, 64, 2), torch.arange(32, 96))
    return pk.prune(model, PrunePlan(tuple(k.int() for k in kept), tuple(dense)))


@pytest.mark.parametrize("name", ["llama", "biases", "mistral", "qwen2"])
def test_widths_that_differ_become_deci(name, words, tmp_path):
    model = uneven(words, name)
    path = save_gguf(model, words, tmp_path / "m.gguf", "f32")
    assert read_gguf(path).architecture == "deci"
    assert read_gguf(path).get("feed_forward_length") == [32, 64]
    again = pk.load(path)
    assert [view.width for view in find_mlps(again)] == [32, 64]
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    pk.save(again, words, tmp_path / "folder")
    assert torch.equal(logits(pk.load(tmp_path / "folder")), logits(again))


def test_widths_that_differ_are_refused_where_no_architecture_knows_them(words, tmp_path):
    with pytest.raises(InputError, match=r"qwen3 knows one width; run .*--format padded"):
        save_gguf(uneven(words, "qwen3"), words, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    model = uneven(words, "qwen3")
    again = pk.load(save_gguf(pad(model), words, tmp_path / "m.gguf", "f32"))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma2", {}, "model of type gemma2; expected one of llama, mistral, qwen2, qwen3"),
        ("qwen2_moe", {}, "model of type qwen2_moe"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu; llama.cpp computes silu"),
        ("llama", {"rope_parameters": YARN}, "rotary embedding of type yarn"),
        ("qwen3", {"attention_bias": True}, r"o_proj\.bias has no place in llama\.cpp's qwen3"),
        ("llama", {"vocab_size": 50}, "the tokenizer has the id 396, the embedding 50 rows"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    name, options, reason, words, tmp_path
):
    model = tiny_model(name, **({"vocab_size": len(words)} | options))
    with pytest.raises(InputError, match=reason):
        save_gguf(model, words, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_llama_cpp_splits_otherwise_are_refused(words, tokenizer, tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    model, _ = made("llama", words)

    def refused(given, reason):
        with pytest.raises(InputError, match=reason):
            save_gguf(model, given, tmp_path / "m.gguf")

    refused(tokenizer, "got a WordTokenizer; expected a tokenizer with a tokenizer.json")
    other = byte_level("qwen2", 400)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    refused(other, "the normalizer Lowercase that is none of gpt-2")
    other.backend_tokenizer.normalizer = normalizers.NFC()
    save_gguf(model, other, tmp_path / "nfc.gguf")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused(other, "a way of splitting text that is none of gpt-2")


def test_weights_that_the_type_cannot_say_are_refused(words, tmp_path):
    model, _ = made("llama", words)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 7e4
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.* 7e\+04, beyond .* f16"):
        save_gguf(model, words, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())
    save_gguf(model, words, tmp_path / "m.gguf", "bf16")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match="holds NaN or Inf"):
        save_gguf(model, words, tmp_path / "n.gguf", "bf16")


def test_export_without_loading_writes_the_same_file(small, words, capsys, monkeypatch):
    path = small / "x.gguf"
    arguments = ["export", str(small / "folder"), "--format", "gguf", "--outtype", "f16"]
    monkeypatch.setattr("prunekit.cli.gguf.load", None)  # it must not be needed
    assert main([*arguments, "-o", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["architecture"], said["widths"]) == ("llama", [96, 96])
    loaded = pk.load(small / "folder")
    again = small / "y.gguf"
    record = read_gguf(path).record
    name = read_gguf(path).keys["general.name"]
    save_gguf(loaded, load_tokenizer(str(small / "folder")), again, "f16", name=name, record=record)
    assert path.read_bytes() == again.read_bytes()


def test_a_gguf_file_is_pruned_exported_and_inspected(small, capsys):
    out, back = small / "half", small / "half.gguf"
    prune = ["prune", str(small / "m.gguf"), "--strategy", "random", "--sparsity", "0.5"]
    assert main([*prune, "--multiple-of", "16", "-o", str(out)]) == 0
    assert main(["export", str(out), "--format", "gguf", "--outtype", "f32", "-o", str(back)]) == 0
    assert torch.equal(logits(pk.load(back)), logits(pk.load(out)))
    twice = small / "twice.gguf"
    arguments = ["--format", "gguf", "--outtype", "f32", "-o", str(twice)]
    assert main(["export", str(back), *arguments]) == 0
    assert torch.equal(logits(pk.load(twice)), logits(pk.load(out)))
    capsys.readouterr()
    assert main(["inspect", str(twice), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["widths"] == [48, 48]
    assert said["record"]["dense_widths"] == [96, 96]
    assert said["record"]["recipe"]["strategy"] == "random"
    assert main(["inspect", str(twice)]) == 0
    assert "qwen2" in capsys.readouterr().out
    shape = load_shape(str(twice))
    assert [view.width for view in find_mlps(shape, verify=False)] == [48, 48]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-o", "m.bin"], "does not end in .gguf"),
        (["-o", "m.gguf"], "exists; choose another name or pass --force"),
        ([], "needs -o OUT"),
    ],
)
def test_bad_names_are_one_line(small, arguments, reason, capsys, monkeypatch):
    monkeypatch.chdir(small)
    assert main(["export", "folder", "--format", "gguf", *arguments]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert main(["inspect", "m.gguf", "--verify"]) == 2


def test_a_file_that_was_cut_is_one_line(small):
    whole = (small / "m.gguf").read_bytes()
    cut = small / "cut.gguf"
    draw = random.Random(0)
    header = len(whole) - 200_000 if len(whole) > 400_000 else len(whole) // 2
    for size in [0, 3, 4, 8, 24, *(draw.randrange(header) for _ in range(40)), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.gguf: (is no|has \d+ bytes)"):
            read_gguf(cut)
    assert main(["inspect", str(cut)]) == 2


def test_a_header_that_lies_is_one_line_or_is_read(small):
    whole = bytearray((small / "m.gguf").read_bytes())
    start = min(t.start for t in read_gguf(small / "m.gguf").tensors.values())
    bent = small / "bent.gguf"
    draw, refused = random.Random(0), 0
    for _ in range(150):
        place = draw.choice([draw.randrange(start), draw.randrange(200)])
        changed = whole[:]
        changed[place] ^= 1 << draw.randrange(8)
        bent.write_bytes(changed)
        try:
            shape = load_shape(str(bent))
            pk.load(bent)
            assert shape is not None
        except InputError:
            refused += 1
    assert refused > 20


def test_tensors_that_do_not_fit_the_keys_are_refused(small, words):
    model, _ = made("llama", words)
    model.config.intermediate_size = 64  # a lie
    for tensor, reason in (("up_proj", "but the keys say"), ("q_norm", "has no place in")):
        path = small / f"{tensor}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in read_gguf(small / "m.gguf").keys.items():
            if key.startswith("llama."):
                add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
                add(key, 64 if (key, tensor) == ("llama.feed_forward_length", "up_proj") else value)
        for name in read_gguf(small / "m.gguf").tensors:
            writer.add_tensor(name, read_gguf(small / "m.gguf").read(name).numpy())
        if tensor == "q_norm":
            writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=reason):
            pk.load(path)


def test_the_embedded_model_is_written_as_it_was_read(demo_model, tmp_path):
    """Its file was written by llama.cpp's own converter: what both say is the same."""
    from prunekit.integrations.loading import _source

    model, tokenizer = demo_model
    folder, options = _source("demo")
    theirs = read_gguf(f"{folder}/{options['gguf_file']}")
    ours = read_gguf(save_gguf(model, tokenizer, tmp_path / "demo.gguf", "f16"))
    differ = {"general.name", "general.file_type", "tokenizer.ggml.add_space_prefix"}
    for key, value in theirs.keys.items():
        if key.startswith(("llama.", "tokenizer.")) and key not in differ:
            assert ours.keys[key] == value, key
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ("token_embd.weight", "blk.7.attn_q.weight", "blk.29.ffn_down.weight"):
        read, written = theirs.read(name).bfloat16().float(), ours.read(name)
        sayable = (read.abs() >= 2**-14) | (read == 0)  # smaller ones have fewer bits in f16
        assert sayable.float().mean() > 0.95
        assert torch.equal(read[sayable], written[sayable])
        assert torch.allclose(read, written, rtol=0, atol=2**-24)
