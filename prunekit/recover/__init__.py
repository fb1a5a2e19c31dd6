"""Recovery: training after pruning, with labels or against the dense model."""

from prunekit.recover.run import recover
from prunekit.recover.settings import METHODS, PRESETS, Settings, resolve

__all__ = ["METHODS", "PRESETS", "Settings", "recover", "resolve"]
