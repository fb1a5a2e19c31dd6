"""prunekit: remove the MLP neurons a task does not need, repair the rest, and prove what it won."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from prunekit.allocation import Sensitivity, sensitivity
from prunekit.arch import MLPView, find_mlps, register_arch
from prunekit.calibrate import calibrate
from prunekit.compact import compact_modules, prune, trying
from prunekit.criteria import score
from prunekit.errors import InputError
from prunekit.evaluate import evaluate
from prunekit.nn import CompactMLP
from prunekit.plan import PrunePlan, plan
from prunekit.recover import recover
from prunekit.stats import NeuronStats

if TYPE_CHECKING:
    from prunekit.checkpoint import save
    from prunekit.experiment.search import search
    from prunekit.experiment.sweep import sweep
    from prunekit.integrations.loading import load
    from prunekit.measure import bench

try:
    __version__ = version("prunekit")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

# Found on first use: they bring in transformers, or take longer to import than the rest together.
_LAZY = {
    "bench": "prunekit.measure",
    "load": "prunekit.integrations.loading",
    "save": "prunekit.checkpoint",
    "search": "prunekit.experiment.search",
    "sweep": "prunekit.experiment.sweep",
}

__all__ = [
    "CompactMLP",
    "InputError",
    "MLPView",
    "NeuronStats",
    "PrunePlan",
    "Sensitivity",
    "bench",
    "calibrate",
    "compact_modules",
    "evaluate",
    "find_mlps",
    "load",
    "plan",
    "prune",
    "recover",
    "register_arch",
    "save",
    "score",
    "search",
    "sensitivity",
    "sweep",
    "trying",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
