"""Goals instead of a sparsity: the least that has to go for a size on disk or a decode speed."""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from prunekit.arch import find_mlps
from prunekit.compact import prune
from prunekit.errors import InputError
from prunekit.experiment.twin import plan_of_widths
from prunekit.measure.comparison import bench_models
from prunekit.measure.memory import model_bytes
from prunekit.plan import kept_width

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}iB".upper(): 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_HEADER = 160  # bytes a tensor needs in a safetensors header, beside its name
_TRIED = (0.25, 0.5, 0.75)  # sparsities whose speed is measured


def parse_bytes(text: str) -> int:
    """The number of bytes in a text such as 200MB, 1.5 GiB or 123456.

    Raises:
        InputError: it is no such text.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS:
        raise InputError(f"target-bytes: got {text!r}; expected a size such as 200MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def sparsities(dense_widths: Sequence[int], multiple_of: int) -> list[float]:
    """Every sparsity, ascending, at which uniform allocation changes a width; the first is 0."""
    found = {0.0}
    for dense in set(dense_widths):
        found |= {1 - w / dense for w in range(multiple_of, dense, multiple_of)}
    return sorted(found)


def sparsity_for_bytes(model: nn.Module, target: int, *, multiple_of: int = 64) -> float:
    """The least sparsity at which a model's weights fit into so many bytes on disk.

    Args:
        model: dense.
        target: bytes of its safetensors files, headers included.
        multiple_of: kept widths are rounded to it.

    Raises:
        InputError: they fit without pruning, or not even with the narrowest MLPs.

    Cost:
        Nothing is measured: neurons are counted.
    """
    views = find_mlps(model, verify=False)
    neuron = [_neuron_bytes(view) for view in views]
    header = sum(_HEADER + len(name) for name, _ in model.named_parameters())
    dense = model_bytes(model) + header

    def size(sparsity: float) -> float:
        gone = (v.width - kept_width(v.width, sparsity, multiple_of) for v in views)
        return dense - sum(n * g for n, g in zip(neuron, gone, strict=True))

    steps = sparsities([v.width for v in views], multiple_of)
    if dense <= target:
        raise InputError(f"target-bytes: got {target}; the dense model has {dense} already")
    if len(steps) == 1 or size(steps[-1]) > target:
        raise InputError(
            f"target-bytes: got {target}; expected at least {size(steps[-1]):.0f}, which is what "
            "is left when every MLP keeps the fewest neurons"
        )
    return steps[bisect_left(steps, True, key=lambda s: size(s) <= target)]


def _neuron_bytes(view) -> float:
    parts = (slot.read(view.width) for slot in view.slots.values())
    return sum(part.numel() * part.element_size() for part in parts) / view.width


def check_speedup(target: float) -> None:
    """Raise InputError unless it asks for more than the dense model's speed."""
    if not 1 < target < float("inf"):
        raise InputError(f"target-speedup: got {target}; expected more than 1")


@dataclass(frozen=True)
class SpeedBySparsity:
    """Decoding speed-ups over the dense model, measured, at sparsities that were reached.

    Attributes:
        sparsity, speedup: the points, from 0 and 1 on.
    """

    sparsity: tuple[float, ...]
    speedup: tuple[float, ...]

    def at(self, sparsity: float) -> float:
        """The speed-up at a sparsity between those measured: linear, and never falling."""
        rising = np.maximum.accumulate(self.speedup)
        return float(np.interp(sparsity, self.sparsity, rising))

    def sparsity_for(self, target: float, steps: Sequence[float]) -> float:
        """The least of some ascending sparsities that reaches a speed-up.

        Raises:
            InputError: the target is not above 1, or faster than anything measured.
        """
        check_speedup(target)
        within = [s for s in steps if s <= self.sparsity[-1]]
        if not within or self.at(within[-1]) < target:
            raise InputError(
                f"target-speedup: got {target}; expected at most {max(self.speedup):.2f}, which "
                f"is what removing {self.sparsity[-1]:.0%} of the neurons gives here"
            )
        return within[bisect_left(within, True, key=lambda s: self.at(s) >= target)]


def measure_speed(
    model: nn.Module,
    *,
    multiple_of: int = 64,
    prompt: int = 128,
    generate: int = 32,
    rounds: int = 5,
) -> SpeedBySparsity:
    """Time decoding (batch 1) of a model at several widths, interleaved with the dense model.

    Speed depends on the widths alone, so the neurons are the first ones and nothing is repaired.

    Cost:
        Three copies of the model, and rounds + 1 decodes of each and of the dense one.
    """
    models, reached = {"dense": model}, [0.0]
    for sparsity in _TRIED:
        chosen = plan_of_widths(model, sparsity, multiple_of)
        if chosen.sparsity > reached[-1]:
            reached.append(chosen.sparsity)
            smaller = prune(copy.deepcopy(model), chosen, compensate="none")
            models[f"{chosen.sparsity:.4f}"] = smaller
    rows = bench_models(models, prompt=prompt, generate=generate, rounds=rounds)
    found = [row.speedup for row in rows if row.test.startswith("tg")]
    return SpeedBySparsity(tuple(reached), (1.0, *found[1:]))
