"""The fixture that others put into their tests, run as they run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.errors import InputError
from prunekit.integrations import pytest_plugin

ROOT = Path(__file__).parents[1]
SUITE = """
import os
import time
import pytest
from tests.models import tiny_model

later = "LATER" in os.environ

@pytest.mark.parametrize("name", ["same", "slower", "other", *(["new"] if later else [])])
def test_speed(prunekit_benchmark, name):
    model = tiny_model("llama")
    seconds = 0.1 if later and name == "slower" else 0.002
    model.register_forward_hook(lambda *_: time.sleep(seconds))
    prompt = 16 if later and name == "other" else 8
    prunekit_benchmark(model, prompt=prompt, generate=4, limit_s=0)
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "conftest.py").write_text(
        'pytest_plugins = ["prunekit.integrations.pytest_plugin"]\n'
        "from prunekit.measure import gate\n"
        "gate.WAITED = 1.0  # what is tried is the fixture, not the machine"
    )
    (tmp_path / "test_speed.py").write_text(SUITE)

    def run(*options, **variables):
        # Among pytest-xdist's workers pytest-benchmark would time nothing.
        outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        environment = outside | {"PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
        done = subprocess.run(command, **run, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_what_is_as_fast_passes_and_all_else_is_said(suite, tmp_path):
    status, said = suite("--prunekit-save")
    assert status == 0, said
    tests = json.loads((tmp_path / "prunekit-baseline.json").read_text())["tests"]
    assert {name.partition("::")[2] for name in tests} == {
        f"test_speed[{name}]" for name in ("same", "slower", "other")
    }
    for test in tests.values():
        assert test["options"] == {"test": "tg", "prompt": 8, "generate": 4, "batch": 1}
        assert len(test["ratios"]) == 11
        assert min(test["ratios"]) > 0
    # Four times as slow is far from noise, and the slower one is fifty times as slow.
    status, said = suite("--prunekit-max-regression", "3", LATER="1")
    assert status == 1
    assert "3 failed, 1 passed" in said
    assert "against prunekit-baseline.json; allowed: 300%" in said
    assert "no baseline of test_speed.py::test_speed[new]; write one" in said
    assert "test_speed[other] was measured with" in said
    status, said = suite("--benchmark-disable", LATER="1")
    assert status == 0, said


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="is no baseline of prunekit's pytest fixture"):
        pytest_plugin._tests(tmp_path / "other.json")
