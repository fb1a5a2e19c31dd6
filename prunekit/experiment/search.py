"""Search: the smallest model whose held-out loss rises by no more than a bound."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.arch import find_mlps, fingerprint
from prunekit.calibrate import calibrate
from prunekit.compact import prune
from prunekit.corpus import Corpus, as_corpus
from prunekit.criteria import score
from prunekit.criteria.auto import gathered_for, resolved
from prunekit.errors import InputError
from prunekit.evaluate import Loss, evaluate_loss
from prunekit.experiment.goals import sparsities
from prunekit.plan import PrunePlan, plan
from prunekit.stats import NeuronStats

HELD_OUT = 5  # every fifth prompt of the target measures the loss and calibrates nothing
FINEST = 32  # no finer than a 32nd of the sparsities: a narrower bracket costs more than it wins
QUICK, REAL = "lstsq", "sequential"


@dataclass(frozen=True)
class Step:
    """One model tried: its repair, its sparsity, and the rise of its held-out loss."""

    repair: str
    sparsity: float
    rise: float
    fits: bool


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        model: the smallest that fits, repaired; None where none does.
        plan: what it keeps; None where none does.
        path: every model tried, in turn.
        dense_loss: on the prompts held out, nats a token.
        best, loss: the step that the model is of, and its loss there; None where none fits.
    """

    model: nn.Module | None
    plan: PrunePlan | None
    path: tuple[Step, ...]
    dense_loss: float
    best: Step | None
    loss: Loss | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the path and what was found."""
        best = None if self.best is None else asdict(self.best)
        return {"dense_loss": self.dense_loss, "path": [*map(asdict, self.path)], "found": best}


def search(
    model: nn.Module,
    tokenizer: Any,
    target: str | Path | Corpus | Sequence[str],
    *,
    max_loss_rise: float,
    criterion: str = "auto",
    multiple_of: int = 64,
    max_length: int = 1024,
    batch_tokens: int = 2048,
    quiet: bool = False,
    report: Callable[[Step], None] | None = None,
) -> Found:
    """Find the smallest uniform model whose loss rises by at most ``max_loss_rise``.

    Every fifth prompt of the target is held out, the others calibrate. Bisection over the widths
    with the quick repair (`lstsq`) finds where to begin; from there on every model is pruned by the
    real pipeline (`sequential`), until one that fits lies next to one that does not.

    Args:
        model: dense; as it was on return.
        tokenizer: its tokenizer.
        target: corpus of the task to keep.
        max_loss_rise: nats a token over the dense model, on the prompts held out.
        criterion: what scores a neuron.
        multiple_of: kept widths are rounded to it.
        max_length: tokens of a prompt that are read.
        batch_tokens: tokens of a batch, padding included.
        quiet: no progress bar.
        report: called with every model tried.

    Raises:
        InputError: a bound that is not above 0, or fewer than ten prompts.

    Cost:
        One calibration with Gram matrices, about log₂(F/multiple_of) quick repairs, a few real
        ones, and a forward over the prompts held out for each. Two models in memory.
    """
    check_bound(max_loss_rise)
    calibration, held_out = hold_out(as_corpus(target, tokenizer))
    gathers = gathered_for(criterion, repaired=True)
    stats = calibrate(
        model,
        tokenizer,
        calibration,
        gram=True,
        gradients="gradient_gram" in gathers,
        taylor="taylor" in gathers,
        max_length=max_length,
        batch_tokens=batch_tokens,
        quiet=quiet,
    )
    options = {"max_length": max_length, "quiet": True}

    def measure(candidate: nn.Module) -> Loss:
        return evaluate_loss(candidate, tokenizer, held_out, **options)

    trial = _Trial(model, stats, criterion, multiple_of, measure, max_loss_rise, report)
    steps = _thinned(sparsities([v.width for v in find_mlps(model, verify=False)], multiple_of)[1:])
    found = smallest(steps, trial)
    path = tuple(trial.path)
    if found is None:
        return Found(None, None, path, trial.dense, None, None)
    smaller, step, loss = trial.kept
    return Found(smaller, smaller.prunekit["plan"], path, trial.dense, step, loss)


def check_bound(max_loss_rise: float) -> None:
    """Raise InputError unless it is a finite rise above 0."""
    if not 0 < max_loss_rise < float("inf"):
        raise InputError(f"max-loss-rise: got {max_loss_rise}; expected nats a token above 0")


def hold_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """A corpus without every fifth prompt, and those."""
    examples = corpus.examples
    if len(examples) < 2 * HELD_OUT:
        raise InputError(
            f"{corpus.name}: got {len(examples)} prompts; a search needs at least {2 * HELD_OUT}, "
            f"since every {HELD_OUT}th is held out"
        )
    rest = tuple(e for i, e in enumerate(examples) if i % HELD_OUT != HELD_OUT - 1)
    return (
        Corpus(f"{corpus.name} (4 of 5)", rest),
        Corpus(f"{corpus.name} (1 of 5)", examples[HELD_OUT - 1 :: HELD_OUT]),
    )


def _thinned(steps: list[float]) -> list[float]:
    return steps[:: max(len(steps) // FINEST, 1)]


class _Trial:
    """Prunes copies of a model, measures them, and keeps the last real one that fits."""

    def __init__(self, model, stats: NeuronStats, criterion, multiple_of, measure, bound, report):
        self.model, self.stats, self.multiple_of = model, stats, multiple_of
        self.measure, self.bound, self.report = measure, bound, report
        self.dense = measure(model).loss
        name = resolved(criterion, stats, repaired=True)
        self.scores = score(stats, model, name)
        made_for = fingerprint(find_mlps(model, verify=False))
        self.recipe = {"criterion": name, "fingerprint": made_for, "stats": stats.hash}
        self.path: list[Step] = []
        self.kept: tuple[nn.Module, Step, Loss] | None = None

    def __call__(self, sparsity: float, repair: str) -> Step:
        chosen = plan(self.scores, sparsity, multiple_of=self.multiple_of, recipe=self.recipe)
        smaller = prune(copy.deepcopy(self.model), chosen, stats=self.stats, compensate=repair)
        loss = self.measure(smaller)
        rise = loss.loss - self.dense
        step = Step(repair, chosen.sparsity, rise, rise <= self.bound)
        self.path.append(step)
        if self.report is not None:
            self.report(step)
        if repair == REAL and step.fits:  # `smallest` then tries none that removes less
            self.kept = smaller, step, loss
        return step


def smallest(steps: Sequence[float], trial: Callable[[float, str], Step]) -> float | None:
    """The largest of some ascending sparsities that fits, the next one not fitting.

    Args:
        steps: sparsities.
        trial: prunes and measures at a sparsity with a repair, `QUICK` or `REAL`.

    Returns:
        The sparsity, or None where not even the first fits.
    """
    first = bisect_left(range(len(steps)), True, key=lambda k: not trial(steps[k], QUICK).fits)
    low, high = -1, len(steps)  # the last that fits, the first that does not
    k, stride = min(first, len(steps) - 1), 1  # the real repair is the better one
    while high - low > 1:
        if trial(steps[k], REAL).fits:
            low = k
        else:
            high = k
        if low >= 0 and high < len(steps):
            k = (low + high) // 2
        else:  # no bracket yet: further out, in strides that double
            k = min(low + stride, len(steps) - 1) if low >= 0 else max(high - stride, 0)
            stride *= 2
    return steps[low] if low >= 0 else None
