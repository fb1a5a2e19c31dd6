"""vLLM in a process beside the tests'. `make test-vllm` makes the environment that has it."""

import os

import pytest

from bench.vllm_process import VLLM


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What vLLM noted of model classes in earlier runs is not used."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def vllm(_own_cache):
    """A process of vLLM, with whatever plugins it finds."""
    process = VLLM()
    yield process
    process.close()


@pytest.fixture(scope="module")
def vllm_without_plugins(_own_cache):
    process = VLLM({"VLLM_PLUGINS": ""})
    yield process
    process.close()
