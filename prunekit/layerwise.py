"""Calibration layer by layer, of a model that memory does not hold.

Each decoder layer is read once for the whole corpus, and once more where gradients are gathered.
Between two layers the hidden states lie on disk, a file a batch, and so do the matrices of MLPs
that are done. All is computed in the order of `calibrate`: the statistics are its own, bit by bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prunekit.arch import MLPView, check_finite, fingerprint, verify_views
from prunekit.backward import idle, loss_backward
from prunekit.batching import Batch, Tokens, batches
from prunekit.calibrate import Encoded, Recorder, check_sizes, check_sums
from prunekit.checkpoint.offloaded import Offloaded
from prunekit.errors import InputError
from prunekit.gradients import (
    Outputs,
    check_gradients,
    gradient_batches,
    output_squares,
    weights_reduced,
)
from prunekit.observe import observed
from prunekit.ops.quick import quick_products
from prunekit.progress import progress_bar
from prunekit.stats import NeuronStats, NeuronSums

_GRADIENT = -1  # the stage under which the gradients of hidden states lie


@quick_products()
def calibrate_layerwise(
    model: Offloaded,
    corpora: Encoded,
    *,
    folder: str | Path,
    gram: bool = False,
    gradients: bool = False,
    taylor: bool = False,
    off_task: bool = False,
    batch_tokens: int = 2048,
    quiet: bool = False,
) -> NeuronStats:
    """Gather what `calibrate` gathers, with one decoder layer in memory.

    Args:
        model: its layers on disk.
        corpora: from `calibrate.encoded`, after which the tokenizer can go.
        folder: where to put what memory need not hold. The statistics' matrices stay there, and
            are read from there, so it must stay as long as they are used.
        gram, gradients, taylor, off_task, batch_tokens, quiet: as for `calibrate`.

    Raises:
        InputError: NaN or Inf, or the disk has no room.

    Cost:
        As `calibrate`, where it keeps no activations, and each layer read once, with gradients
        twice. In memory a layer, what is in none, and an MLP's matrices; on disk `disk_bytes`.
    """
    check_sizes(corpora.max_length, batch_tokens)
    prompts = corpora.prompts
    whole = [name for name in prompts if off_task or name == "target"]
    backwards = whole if gradients or taylor else []
    folder = Path(folder)
    groups = {
        name: gradient_batches(mine, taylor=taylor)
        if name in backwards
        else list(batches(mine, batch_tokens))
        for name, mine in prompts.items()
    }
    need = disk_bytes(
        [view.width for view in model.views],
        model.views[0].down.shape[0],
        len(model.layers),
        model.views[0].gate.element_size(),
        max(sum(batch.ids.numel() for batch in mine) for mine in groups.values()),
        gram=len(whole) if gram else 0,
        backwards=len(backwards),
    )
    room = shutil.disk_usage(folder).free
    if need > room:
        raise InputError(
            f"{folder}: hidden states and matrices need {need / 1e9:.2f} GB there, and "
            f"{room / 1e9:.2f} GB are free"
        )
    squares: dict[str, list[torch.Tensor | None]] = {}
    classes: dict[str, list[NeuronSums]] = {}
    with torch.no_grad():
        for name, mine in prompts.items():
            work = _Class(model, name, mine, folder, gram and name in whole, quiet)
            if name in backwards:
                squares[name] = work.forth_and_back(groups[name], taylor=taylor)
            else:
                work.forth(groups[name])
            classes[name] = work.sums
    replayed = {name: prompts[name] for name in whole if gram}
    kept = {name: squares.get(name) for name in replayed}
    return NeuronStats(
        [view.name for view in model.views],
        classes,
        fingerprint(model.views),
        corpora.provenance(model.model, model.views),
        replayed.get("target"),
        kept.get("target"),
        replayed.get("distractor"),
        kept.get("distractor"),
    )


def disk_bytes(
    widths: Sequence[int],
    hidden: int,
    layers: int,
    itemsize: int,
    tokens: int,
    *,
    gram: int,
    backwards: int,
) -> int:
    """What `calibrate_layerwise` puts on disk at most.

    Args:
        widths: F of each MLP. hidden: D. itemsize: bytes a weight.
        tokens: of the largest class of prompts, padding included.
        gram: how many classes Gram matrices are gathered of.
        backwards: how many run backwards; then the hidden states of all layers are kept, not two
            layers'.
    """
    matrices = gram * sum(width**2 for width in widths) + backwards * len(widths) * hidden**2
    return 4 * matrices + itemsize * hidden * tokens * (layers + 3 if backwards else 2)


class _Hidden:
    """Tensors of every batch on disk, by stage: the layer that they enter."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._facts: dict[Path, tuple[torch.dtype, torch.Size]] = {}

    def _path(self, stage: int, number: int) -> Path:
        return self.folder / f"hidden-{stage}-{number}"

    def put(self, stage: int, number: int, value: torch.Tensor) -> None:
        path = self._path(stage, number)
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        try:
            flat.numpy().tofile(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        self._facts[path] = value.dtype, value.shape

    def get(self, stage: int, number: int) -> torch.Tensor:
        path = self._path(stage, number)
        dtype, shape = self._facts[path]
        return torch.from_numpy(np.fromfile(path, np.uint8)).view(dtype).view(shape)

    def drop(self, stage: int, count: int) -> None:
        """Remove what lies under a stage, of so many batches."""
        for number in range(count):
            path = self._path(stage, number)
            path.unlink(missing_ok=True)
            self._facts.pop(path, None)


class _Class:
    """The calibration of one class of prompts."""

    def __init__(
        self,
        model: Offloaded,
        name: str,
        prompts: list[Tokens],
        folder: Path,
        gram: bool,
        quiet: bool,
    ):
        self.model, self.name, self.prompts = model, name, prompts
        self.folder, self.quiet = folder, quiet
        self.hidden = _Hidden(folder)
        self.sums = [NeuronSums.zeros(view.width, model.device) for view in model.views]
        self._gram = gram

    def forth(self, groups: list[Batch]) -> None:
        """Run forwards, and forget the hidden states of every layer that is behind."""
        with self._bar(groups) as bar, torch.inference_mode():
            self._embed(groups)
            for number in range(len(self.model.layers)):
                self._forth(number, groups, bar, backwards=False)
                self.hidden.drop(number, len(groups))
        self.hidden.drop(len(self.model.layers), len(groups))

    def forth_and_back(self, groups: list[Batch], *, taylor: bool) -> list[torch.Tensor | None]:
        """Run forwards, and the loss backwards; returns what `add_gradients` does."""
        model = self.model
        squares = output_squares(model.views, self.prompts)
        last = len(model.layers)
        with self._bar(groups, passes=2) as bar:
            self._embed(groups)
            for number in range(last):
                self._forth(number, groups, bar, backwards=True)
            self._through_the_head(groups)
            for number in reversed(range(last)):
                self._back(number, groups, squares, taylor, bar)
                self.hidden.drop(number, len(groups))
        self.hidden.drop(_GRADIENT, len(groups))
        return squares

    def _bar(self, groups: list[Batch], passes: int = 1) -> tqdm:
        total = passes * len(self.model.layers) * sum(batch.tokens for batch in groups)
        return progress_bar(total, f"calibrate {self.name}", "tok", quiet=self.quiet)

    def _embed(self, groups: list[Batch]) -> None:
        with self.model.with_ends():
            check_finite(self.model.model, self.model.views)
            for b, batch in enumerate(groups):
                self.hidden.put(0, b, self.model.embed(batch))

    def _of(self, number: int) -> tuple[list[MLPView], list[NeuronSums]]:
        inside = self.model.inside[number]
        return [self.model.views[i] for i in inside], [self.sums[i] for i in inside]

    def _forth(self, number: int, groups: list[Batch], bar: tqdm, *, backwards: bool) -> None:
        """Take every batch through a layer, and gather its MLPs' statistics."""
        model, (views, many) = self.model, self._of(number)
        for view, sums in zip(views, many, strict=True):
            if self._gram:
                sums.gram = torch.zeros(view.width, view.width, device=model.device)
        recorder = Recorder(views, many)
        taps = (recorder.differentiable,) if backwards else (recorder, recorder.mlp)
        with ExitStack() as stack:
            stack.enter_context(model.resident(number))
            check_finite(model.model, model.views)
            verify_views(views)
            stack.enter_context(observed(views, *taps))
            run = stack.enter_context(model.alone(number))
            # As the forward that runs backwards does: attention differs where gradients are asked.
            stack.enter_context(torch.set_grad_enabled(backwards))
            for b, batch in enumerate(groups):
                recorder.begin(batch)
                entering = self._entering(number, b, backwards)
                self.hidden.put(number + 1, b, run(batch, entering))
                bar.update(batch.tokens)
        check_sums(views, self.name, many)
        self._put_away(number)

    def _entering(self, number: int, b: int, backwards: bool) -> torch.Tensor:
        return self.hidden.get(number, b).to(self.model.device).requires_grad_(backwards)

    def _put_away(self, number: int) -> None:
        """Finish the sums of a layer, and leave their matrices on disk."""
        for i in self.model.inside[number]:
            self.sums[i].finish()
            self.sums[i].put_away(self.folder / f"{self.name}-{i}")

    def _through_the_head(self, groups: list[Batch]) -> None:
        """Leave the loss's gradient at the last layer's output."""
        model, last = self.model, len(self.model.layers)
        with ExitStack() as stack:
            stack.enter_context(model.with_ends())
            stack.enter_context(idle(model.layers))
            backward = stack.enter_context(loss_backward(model.model, model.views, groups))
            for b, batch in enumerate(groups):
                leaving = self._entering(last, b, True)
                with model.ending(leaving):
                    backward(batch)
                self.hidden.put(_GRADIENT, b, leaving.grad)
        self.hidden.drop(last, len(groups))

    def _back(
        self,
        number: int,
        groups: list[Batch],
        squares: list[torch.Tensor | None],
        taylor: bool,
        bar: tqdm,
    ) -> None:
        """Take every batch's gradient through a layer, from its output to its input."""
        model, (views, many) = self.model, self._of(number)
        for view, sums in zip(views, many, strict=True):
            sums.gradient_gram = torch.zeros(2 * view.down.shape[:1], device=model.device)
            if taylor:
                sums.taylor = torch.zeros(view.width, dtype=torch.float64, device=model.device)
        mine = [squares[i] for i in model.inside[number]]
        outputs, recorder = Outputs(views, many, self.prompts, mine), Recorder(views, many)
        with ExitStack() as stack:
            stack.enter_context(model.resident(number))
            if taylor:
                stack.enter_context(weights_reduced(model.layers[number], views, many))
            stack.enter_context(outputs.watched())
            stack.enter_context(observed(views, recorder.differentiable))
            run = stack.enter_context(model.alone(number))
            stack.enter_context(torch.enable_grad())
            for b, batch in enumerate(groups):
                outputs.batch = batch
                entering = self._entering(number, b, True)
                gradient = self.hidden.get(_GRADIENT, b).to(model.device)
                run(batch, entering).backward(gradient)
                self.hidden.put(_GRADIENT, b, entering.grad)
                bar.update(batch.tokens)
        check_gradients(views, many)
        self._put_away(number)
