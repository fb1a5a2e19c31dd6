"""`prunekit bench --save` and `--check`: a baseline, and what became slower than it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import nn

from prunekit.cli.output import Output
from prunekit.config import BenchConfig
from prunekit.errors import CheckError, InputError
from prunekit.integrations.fixed_shapes import Way
from prunekit.measure import gate


def check_gate(config: BenchConfig) -> None:
    """Raise InputError where the options of --save and --check make no sense."""
    if config.save and config.check:
        raise InputError("--save: not together with --check; save first, check later")
    if config.max_regression <= 0:
        raise InputError(f"--max-regression: got {config.max_regression}; expected 0.05, say")
    for name in ("llamacpp", "report"):
        if getattr(config, name):
            raise InputError(f"--{name}: not with --save or --check, which hold models to a ratio")


def run(
    config: BenchConfig,
    models: Mapping[str, nn.Module],
    batch: Sequence[int],
    way: Way,
    output: Output,
) -> int:
    """Write a baseline, or hold the models against one."""
    sizes = {"prompt": config.prompt, "generate": config.generate, "batch": list(batch)}
    options = sizes | {"compact": config.compact, "engine": str(way), "models": list(models)}
    if config.save:
        shape = gate.Shape.of(next(iter(models.values())))
    else:
        before, shape = gate.read_baseline(config.check, options)
    tests, more = gate.measured(models, way=way, shape=shape, **sizes)
    waiting = gate.Waiting()
    if config.save:
        ratios = more(max(config.rounds, gate.ROUNDS), tests)
        gate.save_baseline(config.save, ratios, shape, options)
        _note_waiting(waiting.share(), "save it again when the machine is quiet", output)
        output.line(
            f"{config.save}: {len(ratios)} tests, times over those of a plain model of this shape"
        )
        output.json({"baseline": config.save, "ratios": ratios})
        return 0
    limits = config.max_regression, config.time_limit
    found = gate.decide(before, more, *limits, waited=waiting.share)
    table = [
        (v.test, f"{v.change:+.1%}", f"{v.low:+.1%} to {v.high:+.1%}", v.timings, v.verdict)
        for v in found
    ]
    columns = ("test", "change", "95 %", "timings", "verdict")
    output.table(f"time against {config.check}", columns, table)
    slower = [v.test for v in found if v.verdict == gate.REGRESSED]
    undecided = [v.test for v in found if v.verdict == gate.UNDECIDED]
    if undecided:
        output.note(f"not decided in {config.time_limit:.0f} s: {', '.join(undecided)}")
    _note_waiting(waiting.share(), "no alarm is raised by what was timed then", output)
    output.json({"verdicts": [asdict(v) for v in found]})
    if slower:
        raise CheckError(f"slower by more than {config.max_regression:.0%}: {', '.join(slower)}")
    return 0


def _note_waiting(share: float, so: str, output: Output) -> None:
    if share > gate.WAITED:
        output.note(f"{share:.0%} of the time others had the processor: {so}")
