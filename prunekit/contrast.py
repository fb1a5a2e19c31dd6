"""Contrast: target and distractor weighed against each other in one set of statistics.

A neuron that only the distractor needs is free to go, one that both need is not, and between them
lies a choice that no statistic can make: how much of the off-task ability to keep. The answer is a
number, the weight of a distractor token where a target token has weight 1. Every criterion and
every repair then minimises the same weighted error, since all of them read sums over tokens.
"""

from __future__ import annotations

from dataclasses import replace

from prunekit.errors import InputError
from prunekit.stats import NeuronStats, join_prompts, join_squares


def check_keep_off_task(keep_off_task: float) -> None:
    """Raise InputError unless 0 <= keep_off_task <= 1."""
    if not 0 <= keep_off_task <= 1:
        raise InputError(f"keep_off_task: got {keep_off_task}; expected a weight from 0 to 1")


def against(stats: NeuronStats, distractor: NeuronStats) -> NeuronStats:
    """The statistics of one task with those of another task as its distractor.

    Each is a calibration of its own, of one model, so a task is calibrated once whatever it is
    contrasted with.

    Args:
        stats: its target stays the target.
        distractor: its target becomes the distractor.

    Raises:
        InputError: they were taken on two models.
    """
    if stats.fingerprint != distractor.fingerprint:
        raise InputError("contrast: the two calibrations were taken on two different models")
    seen = [
        corpus | {"class": name}
        for name, found in (("target", stats), ("distractor", distractor))
        for corpus in found.provenance.get("corpora", [])
        if corpus["class"] == "target"
    ]
    return replace(
        stats,
        classes={"target": stats.target, "distractor": distractor.target},
        provenance=stats.provenance | {"corpora": seen},
        distractor_prompts=distractor.prompts,
        distractor_squares=distractor.gradient_squares,
    )


def weigh(stats: NeuronStats, keep_off_task: float) -> NeuronStats:
    """Statistics whose target is the target with the distractor mixed in.

    Second moments become C = C_target + keep_off_task·C_distractor, up to scale, each a mean over
    its class's tokens whatever the sizes of the corpora; so do the loss gradients' and every other
    sum. The distractor's prompts join the target's with that weight, for repairs that run the
    model again.

    Args:
        stats: with both classes, from ``calibrate(off_task=True)`` or `against` where there are
            Gram matrices. Loss gradients that the distractor lacks are left out.
        keep_off_task: 0 spends the off-task ability freely: the statistics come back as they are;
            1 holds the distractor as dear as the target.

    Returns:
        Statistics with a target alone: a criterion that contrasts by itself is not served.

    Raises:
        InputError: out of range, no distractor, or it lacks what the target has.

    Cost:
        4·F² bytes an MLP for its mixed Gram matrix.
    """
    check_keep_off_task(keep_off_task)
    if keep_off_task == 0:
        return stats
    if "distractor" not in stats.classes:
        raise InputError(
            "keep_off_task: no distractor statistics; calibrate with --distractor FILE"
        )
    target, distractor = stats.target, stats.classes["distractor"]
    if target[0].held("gram") is not None and distractor[0].held("gram") is None:
        raise InputError(
            "keep_off_task: the distractor's statistics hold no gram; calibrate with --off-task"
        )
    # Over all MLPs: an expert that the distractor prefers keeps its preference.
    weight = keep_off_task * sum(s.tokens for s in target) / sum(s.tokens for s in distractor)
    mixed = [t.merge(d.scaled(weight)) for t, d in zip(target, distractor, strict=True)]
    theirs = stats.distractor_prompts
    if theirs is not None:
        theirs = [replace(p, weight=weight) for p in theirs]
    return replace(
        stats,
        classes={"target": mixed},
        provenance=stats.provenance | {"keep_off_task": keep_off_task},
        prompts=join_prompts(stats.prompts, theirs),
        gradient_squares=join_squares(stats.gradient_squares, stats.distractor_squares),
        distractor_prompts=None,
        distractor_squares=None,
    )
