"""Finds the fastest configuration of each kernel at each shape, among those its file proposes.

A candidate has to be right, and to beat what would serve now by more than the spread of both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import prunekit_kernels
from bench.gpu.results import WrongError
from bench.gpu.speed import race, warm_up
from prunekit.measure.timing import Summary, summarise
from prunekit_kernels import tuning
from prunekit_kernels.tuning import Config

_TRIAL_ROUNDS = 7
_FINALISTS = 2
_LEAST_GAIN = 0.01  # below, the table's line is worth less than its place


def candidates(most: int | None = None) -> dict[str, list[Config]]:
    """Return what the kernels' files propose, by the kernel's name in the table: ``most`` each."""
    found: dict[str, list[Config]] = {}
    for module in pkgutil.iter_modules(prunekit_kernels.__path__):
        loaded = importlib.import_module(f"prunekit_kernels.{module.name}")
        found |= getattr(loaded, "CANDIDATES", {})
    return {kernel: configs[:most] for kernel, configs in found.items()}


class Table(dict[str, Config]):
    """The table of configurations, which also writes down what it is asked and what was served."""

    def __init__(self, known: dict[str, Config]):
        super().__init__(known)
        self.asked: dict[str, Config] = {}

    def get(self, key: str, default: Config) -> Config:
        self.asked[key] = super().get(key, default)
        return self.asked[key]

    def asked_by(self, run: Callable[[], object]) -> dict[str, Config]:
        """Return the keys that a run asks for, with what serves them, inner kernels first.

        A host function chooses its path before the kernels on it, so the order is turned round.
        """
        self.asked = {}
        run()
        return dict(reversed(self.asked.items()))


def tune(
    key: str,
    default: Config,
    proposed: list[Config],
    *,
    check: Callable[[], object],
    prepare: Callable[[], Callable[[], float]],
    alive: Callable[[], bool],
    another: Callable[[], bool],
    rounds: int,
) -> dict[str, Any]:
    """Time what a kernel's file proposes for one key of the table.

    Args:
        key: as `tuning.key` gives it.
        default: what serves now.
        proposed: the candidates.
        check: runs the operation, and raises WrongError where it is wrong.
        prepare: compiles and captures the operation; returns what times one run.
        alive: whether the device still answers.
        another: whether another candidate may be begun.
        rounds: of the finalists against the default.

    Returns:
        ``chosen`` (None where the default stays), and what was seen of every candidate. ``error``
        names candidates that gave wrong results.

    Raises:
        RuntimeError: a candidate left the device unusable.
    """
    kernel = key.split(" ", 1)[0]
    trials: list[tuple[float, Config]] = []
    rejected: list[dict[str, Any]] = []
    wrong: list[str] = []
    untried = 0
    for config in proposed:
        if config == default:
            continue
        if not another():
            untried += 1
            continue
        try:
            with tuning.trying(kernel, config):
                check()
                once = prepare()
                warm_up(once)
                trials.append((summarise([once() for _ in range(_TRIAL_ROUNDS)]).median, config))
        except Exception as error:  # too much shared memory, too many registers, ...
            if not alive():
                raise RuntimeError(f"{config} left the device unusable: {error}") from error
            why = f"{type(error).__name__}: {error}"[:300]
            rejected.append({"config": config, "why": why})
            if isinstance(error, WrongError):
                wrong.append(f"{config} is wrong: {error}")

    trials.sort(key=lambda trial: trial[0])
    finalists = [config for _, config in trials[:_FINALISTS]]
    runs = {"default": prepare()}
    for place, config in enumerate(finalists):
        with tuning.trying(kernel, config):
            runs[place] = _under(kernel, config, prepare())
    summaries = race(runs, rounds)
    best = min(range(len(finalists)), key=lambda p: summaries[p].median, default=None)
    beats = best is not None and _beats(summaries[best], summaries["default"])
    found = {
        "default": default,
        "chosen": finalists[best] if beats else None,
        "seconds": {str(name): asdict(summary) for name, summary in summaries.items()},
        "finalists": finalists,
        "trials": [{"config": config, "median": seconds} for seconds, config in trials],
        "rejected": rejected,
        "untried": untried,
    }
    return found | ({"error": "; ".join(wrong)} if wrong else {})


def _beats(challenger: Summary, default: Summary) -> bool:
    """Whether the quartiles lie apart, and the medians far enough to matter."""
    gain = 1 - challenger.median / default.median
    return challenger.high < default.low and gain >= _LEAST_GAIN


def _under(kernel: str, config: Config, once: Callable[[], float]) -> Callable[[], float]:
    """Time a run under a configuration: a run that is no graph chooses anew every time."""

    def timed() -> float:
        with tuning.trying(kernel, config):
            return once()

    return timed
