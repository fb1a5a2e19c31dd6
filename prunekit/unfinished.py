"""A calibration under way, as a file: to go on from where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunekit import files
from prunekit.batching import Tokens
from prunekit.errors import InputError
from prunekit.stats import NeuronStats, NeuronSums
from prunekit.values import conform

_STATE = {"key": str, "class": str, "done": int}


class Unfinished:
    """What is known of a calibration that is not through with all its prompts.

    Args:
        names, fingerprint: of the model's MLPs.
        asked: all that decides the result; what was kept of another calibration is refused.
        prompts: encoded, by class, of those classes whose gradients' squares are kept.
        path: where to keep it; None keeps nothing.
        resume: begin with what is at path, where there is something.

    Attributes:
        classes: the sums so far, one an MLP, by class of prompts; the last is the current one.
        squares: of the gradients of every token, by class.
        done: batches of the current class that are through.

    Raises:
        InputError: what is at path is broken, or of another calibration.
    """

    def __init__(
        self,
        names: list[str],
        fingerprint: str,
        asked: Any,
        prompts: dict[str, list[Tokens]],
        path: str | Path | None,
        *,
        resume: bool = False,
    ):
        self._names, self._fingerprint, self._key = names, fingerprint, files.digest(asked)
        self._prompts, self._path = prompts, None if path is None else Path(path)
        self.classes: dict[str, list[NeuronSums]] = {}
        self.squares: dict[str, list[torch.Tensor | None]] = {}
        self.done = 0
        if resume and self._path is not None and self._path.exists():
            self._read()

    @property
    def keeps(self) -> bool:
        """Whether there is a file to keep it in."""
        return self._path is not None

    def _read(self) -> None:
        stats = NeuronStats.load(self._path, finished=False)
        state = stats.provenance.get("unfinished")
        try:
            conform(state, _STATE, "unfinished")
        except ValueError as error:
            raise InputError(f"{self._path}: {error}") from error
        fits = stats.fingerprint == self._fingerprint and list(stats.classes)[-1:] == [
            state["class"]
        ]
        if state["key"] != self._key or not fits or state["done"] < 0:
            raise InputError(
                f"{self._path}: is of another model, corpora or options; give those, or leave out "
                "--resume to begin anew"
            )
        for many in stats.classes.values():
            for sums in many:
                sums.to("cpu")  # the file will be written anew
        self.classes, self.done = stats.classes, state["done"]
        found = {"target": stats.gradient_squares, "distractor": stats.distractor_squares}
        self.squares = {name: squares for name, squares in found.items() if squares is not None}

    def keep(self, done: int) -> None:
        """Write down everything, so many batches of the last class being through."""
        state = {"key": self._key, "class": list(self.classes)[-1], "done": done}
        NeuronStats(
            self._names,
            self.classes,
            self._fingerprint,
            {"unfinished": state},
            self._prompts.get("target"),
            self.squares.get("target"),
            self._prompts.get("distractor"),
            self.squares.get("distractor"),
        ).save(self._path, finished=False)
