"""A pytest fixture that fails a test where a model became slower than its baseline.

In the conftest.py of a repository of your own, with pytest-benchmark installed:

    pytest_plugins = ["prunekit.integrations.pytest_plugin"]

and in a test:

    def test_decoding_stays_fast(prunekit_benchmark):
        prunekit_benchmark(AutoModelForCausalLM.from_pretrained("small"), test="tg")

`pytest --prunekit-save` writes the baseline, `pytest` holds the model against it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from prunekit.errors import InputError
from prunekit.files import read_json, write_json
from prunekit.integrations.plain_llama import Shape
from prunekit.measure import gate
from prunekit.measure.comparison import cases_of
from prunekit.measure.provenance import provenance
from prunekit.measure.timing import seconds_of

KIND = "prunekit pytest baseline"
BASELINE = "prunekit-baseline.json"
TESTS = ("pp", "tg")  # prefill and decode


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prunekit", "speed of pruned models")
    add = group.addoption
    add("--prunekit-baseline", default=BASELINE, metavar="FILE", help=f"(default {BASELINE})")
    add("--prunekit-save", action="store_true", help="write the baseline instead of checking it")
    add(
        "--prunekit-max-regression", type=float, default=0.05, metavar="SHARE", help="(default 5%%)"
    )


@pytest.fixture
def prunekit_benchmark(benchmark, request: pytest.FixtureRequest) -> Callable[..., gate.Verdict]:
    """Time a model against a plain one of its shape, and both against a saved baseline.

    Called with a model, and by name with ``test`` ("pp": prefill, "tg": decoding), ``prompt`` and
    ``generate`` in tokens, ``batch`` and ``limit_s``, after which no further rounds are begun.
    pytest-benchmark's table has the seconds; the ratio to the reference decides, since a slower
    machine changes both. Returns the verdict of `prunekit.measure.gate`; an undecided one is no
    failure.
    """
    config = request.config
    path = Path(config.getoption("--prunekit-baseline"))
    name = request.node.nodeid

    def run(
        model: nn.Module,
        *,
        test: str = "tg",
        prompt: int = 128,
        generate: int = 32,
        batch: int = 1,
        limit_s: float = 60.0,
    ) -> gate.Verdict | None:
        if test not in TESTS:
            raise InputError(f"prunekit_benchmark: got test {test!r}; expected one of {TESTS}")
        waiting = gate.Waiting()
        options = {"test": test, "prompt": prompt, "generate": generate, "batch": batch}
        saves = config.getoption("--prunekit-save")
        compared = not saves and not benchmark.disabled
        before, shape = _read(path, name, options) if compared else ([], Shape.of(model))
        timed = {"model": model, "reference": shape.build(model.device, model.dtype)}
        cases = cases_of(timed, prompt, generate, [batch]).items()
        case, reference = (run for (_, found, _), (run, _) in cases if found.startswith(test))
        ratios = _first_rounds(benchmark, case, reference)
        if not ratios:
            return None  # --benchmark-disable: it ran once, and nothing was timed
        if saves:
            _save(path, name, ratios, shape, options)
            return None
        rounds = iter([ratios])  # those that were timed already come first

        def more(count: int, _: Collection[str]) -> gate.Ratios:
            return {name: next(rounds, None) or _rounds(case, reference, count)}

        most = config.getoption("--prunekit-max-regression")
        (found,) = gate.decide({name: before}, more, most, limit_s, waited=waiting.share)
        benchmark.extra_info["prunekit"] = asdict(found)
        if found.verdict == gate.REGRESSED:
            interval = f"{found.low:+.1%} to {found.high:+.1%}"
            said = (
                f"time {found.change:+.1%} (95 %: {interval}) against {path}; allowed: {most:.0%}"
            )
            pytest.fail(said, pytrace=False)
        return found

    return run


def _first_rounds(benchmark, case: Callable, reference: Callable) -> list[float]:
    """Ratios of rounds that pytest-benchmark timed, the reference before and after each."""
    marks: list[float] = []
    setup = partial(_mark, marks, reference)
    rounds = {"rounds": gate.ROUNDS, "warmup_rounds": 1, "iterations": 1}
    benchmark.pedantic(case, setup=setup, **rounds)
    if benchmark.stats is None:
        return []
    setup()
    taken = benchmark.stats.stats.data
    around = pairwise(marks[-len(taken) - 1 :])
    return [gate.ratio(a, t, b) for (a, b), t in zip(around, taken, strict=True)]


def _mark(marks: list[float], reference: Callable) -> None:
    marks.append(seconds_of(reference))


def _rounds(case: Callable, reference: Callable, count: int) -> list[float]:
    return list(gate.between([case] * count, reference))


def _tests(path: Path) -> dict[str, dict[str, Any]]:
    """The baselines of a file by test; none where there is no file yet."""
    if not path.exists():
        return {}
    value = read_json(path)
    expected = {"kind": KIND, "schema": gate.SCHEMA}
    if not isinstance(value, dict) or not value.items() >= expected.items():
        raise InputError(
            f"{path}: is no baseline of prunekit's pytest fixture in this version; "
            "write one with pytest --prunekit-save"
        )
    return value["tests"]


def _save(
    path: Path, name: str, ratios: list[float], shape: Shape, options: dict[str, Any]
) -> None:
    """Add a test to the baselines of a file, or replace it there."""
    tests = _tests(path)
    tests[name] = {"options": options, "reference": asdict(shape), "ratios": ratios}
    facts = {"kind": KIND, "schema": gate.SCHEMA, "tests": tests}
    write_json(path, facts | {"provenance": provenance()})


def _read(path: Path, name: str, options: dict[str, Any]) -> tuple[list[float], Shape]:
    known = _tests(path)
    if name not in known:
        raise InputError(f"{path}: no baseline of {name}; write one with pytest --prunekit-save")
    if known[name]["options"] != options:
        raise InputError(
            f"{path}: {name} was measured with {known[name]['options']}, not {options}; "
            "write it anew with pytest --prunekit-save"
        )
    return known[name]["ratios"], Shape.read(known[name].get("reference"))
