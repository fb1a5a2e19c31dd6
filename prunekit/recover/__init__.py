"""Recovery: training after pruning, with labels or against the dense model."""

from prunekit.recover.run import is_first_process, recover
from prunekit.recover.settings import METHODS, PRESETS, Settings, resolve

__all__ = ["METHODS", "PRESETS", "Settings", "is_first_process", "recover", "resolve"]
