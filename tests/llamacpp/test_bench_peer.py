"""llama.cpp takes part in a benchmark's rounds, and does the work that its tests are named for."""

import pytest

from prunekit.integrations.llamacpp import LlamaCpp
from prunekit.measure.comparison import bench_models
from tests.models import tiny_model
from tests.vocabularies import byte_level

PROMPT, GENERATE = 24, 6


@pytest.fixture(scope="module")
def models():
    widths = {"dense": 96, "small": 32}
    return {n: tiny_model("llama", vocab_size=400, intermediate_size=w) for n, w in widths.items()}


@pytest.fixture
def llama(models, tmp_path):
    words = byte_level("qwen2", 400)
    pairs = {name: (model, words) for name, model in models.items()}
    return LlamaCpp(pairs, tmp_path, "f16", PROMPT + GENERATE)


def test_its_rows_stand_beside_those_of_transformers(models, llama):
    rows = bench_models(
        models,
        prompt=PROMPT,
        generate=GENERATE,
        batch=(1, 2),
        rounds=2,
        explain=True,
        peers=[llama],
    )
    own = [row for row in rows if row.engine == "transformers"]
    theirs = [(row.model, row.test, row.batch) for row in rows if row.engine == "llama.cpp"]
    assert len(own) == 2 * 2 * 2
    tests = f"pp{PROMPT}", f"tg{GENERATE}"
    assert theirs == [(name, test, 1) for test in tests for name in models]
    for row in rows:
        if row.engine == "llama.cpp":
            assert (row.dtype, row.bound, row.parts) == ("f16", None, None)
            assert row.speedup == 1.0 or row.model == "small"


def test_decoding_begins_behind_the_prompt_every_time(llama):
    """Else the context, which has room for one decode, would be full."""
    decode = llama.decode("dense", PROMPT, GENERATE)
    for _ in range(3):
        decode()
        memory = llama._lib.llama_get_memory(llama.engines["dense"].ctx)
        assert llama._lib.llama_memory_seq_pos_max(memory, 0) == PROMPT + GENERATE - 1
