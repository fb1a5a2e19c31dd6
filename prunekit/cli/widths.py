"""Which widths run well here: `prunekit bench --widths`, and what `--multiple-of auto` means."""

from __future__ import annotations

from dataclasses import asdict

import torch

from prunekit.arch import find_mlps
from prunekit.cli.output import Output
from prunekit.config import BenchConfig
from prunekit.errors import InputError
from prunekit.integrations.loading import load_shape
from prunekit.measure.provenance import provenance
from prunekit.measure.widths import GRID, TOLERATED, Widths, measure_widths

AUTO = "auto"


def check_multiple_of(multiple_of: int | str) -> None:
    """Raise InputError unless it is a positive number, or auto."""
    if multiple_of != AUTO and multiple_of < 1:
        raise InputError(f"--multiple-of: got {multiple_of}; expected at least 1, or {AUTO}")


def resolved_multiple(multiple_of: int | str, model: str, dtype: str, output: Output) -> int:
    """The number that --multiple-of says, or what this machine's times advise."""
    if multiple_of != AUTO:
        return multiple_of
    found = _measured(model, dtype)
    output.line(f"--multiple-of {AUTO}: {found.advice}; {_sentence(found)}")
    return found.advice


def run(config: BenchConfig, output: Output) -> int:
    """Print what widths beside the grid cost, and the multiple to round to."""
    found = _measured(config.model, config.dtype, rounds=config.rounds, compact=config.compact)
    counts = sorted(found.seconds)
    names = {count: "decode" if count == 1 else f"prefill of {count}" for count in counts}
    rows = [
        (
            str(each.multiple),
            " ".join(map(str, each.widths)),
            *(
                text
                for count in counts
                for text in (
                    f"{each.excess[count]:+.1%}",
                    "{:+.1%} to {:+.1%}".format(*each.interval[count]),
                )
            ),
        )
        for each in found.alignments
    ]
    columns = [text for count in counts for text in (names[count], "95 %")]
    output.table(
        f"an MLP's time, against that of its neurons at multiples of {GRID}",
        ("multiple of", "widths", *columns),
        rows,
    )
    facts = provenance()
    output.line(f"{facts['device']}; torch {facts['versions']['torch']}; {_sentence(found)}")
    advice = {"multiple_of": found.advice, "tolerated": TOLERATED}
    output.json(advice | asdict(found) | {"provenance": facts})
    return 0


def _measured(model: str, dtype: str, **options) -> Widths:
    view = find_mlps(load_shape(model, dtype=dtype), verify=False)[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return measure_widths(view, device=device, **options)


def _sentence(found: Widths) -> str:
    said = f"multiples of {found.advice} cost what their neurons do, within {TOLERATED:.0%}"
    cliffs = [
        (share, count, each.widths[-1])
        for each in found.alignments
        if each.multiple < found.advice
        for count, share in each.cliffs.items()
    ]
    if not cliffs:
        return f"{said}: here every width does as well"
    share, count, width = max(cliffs)
    when = "in decoding" if count == 1 else f"in a prefill of {count} tokens"
    return f"{said}; widths like {width} cost {share:.0%} more {when}"
