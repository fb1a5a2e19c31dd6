"""Does the gate hold on this machine: an unchanged model, a slower one, and a busy machine.

The embedded model, half of its MLP neurons removed, through drop-in MLPs. One baseline is saved;
then trials take turns, each a check against it from its first round on: the unchanged model must
never raise an alarm; the same with every MLP made slower by a tenth must raise one; and, while
another process keeps the processor busy, the former must raise none and the latter must not pass.
Figures go to OUT/gate.json. Exit status 1 where one of these fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from prunekit.backward import calling_instead
from prunekit.compact import compact_modules, prune
from prunekit.config import DTYPES
from prunekit.experiment.twin import plan_of_widths
from prunekit.files import write_json
from prunekit.integrations.loading import load
from prunekit.measure import gate
from prunekit.measure.parts import parts_of
from prunekit.measure.provenance import provenance

SLOWER = 0.10
KINDS = ("unchanged", "slower", "unchanged, busy", "slower, busy")


@contextmanager
def slowed(model: nn.Module, by: float) -> Iterator[None]:
    """Inside, every MLP takes so much longer than it would."""

    def waiting(forward: Callable) -> Callable:
        def run(*given, **named):
            begun = time.perf_counter()
            out = forward(*given, **named)
            until = begun + (1 + by) * (time.perf_counter() - begun)
            while time.perf_counter() < until:
                pass
            return out

        return run

    with ExitStack() as stack:
        for module in parts_of(model)["mlp"]:
            stack.enter_context(calling_instead(module, waiting(module.forward)))
        yield


@contextmanager
def busy() -> Iterator[None]:
    """Inside, another process computes without a pause."""
    code = "import torch; torch.set_num_threads(1); x = torch.randn(800, 800)\nwhile True: x @ x"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(3)  # until it has begun
        yield
    finally:
        process.kill()
        process.wait()


def said(found: Sequence[gate.Verdict]) -> str:
    """What the whole check says: regressed where a test is, else undecided where one is."""
    verdicts = {each.verdict for each in found}
    return next((v for v in (gate.REGRESSED, gate.UNDECIDED) if v in verdicts), gate.OK)


def failures(answers: dict[str, Counter]) -> list[str]:
    """What should not have been said."""
    wrong = []
    for kind, counted in answers.items():
        total = sum(counted.values())
        if kind.startswith("unchanged") and counted[gate.REGRESSED]:
            wrong.append(f"{kind}: {counted[gate.REGRESSED]} false alarms in {total}")
        if kind == "slower" and counted[gate.REGRESSED] < total:
            wrong.append(f"{kind}: {counted[gate.REGRESSED]} of {total} caught")
        if kind == "slower, busy" and counted[gate.OK]:
            wrong.append(f"{kind}: passed {counted[gate.OK]} times in {total}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate_trials", description=__doc__)
    add = parser.add_argument
    add("--trials", type=int, default=20, help="of each kind")
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    add("--dtype", default="auto", choices=DTYPES)
    add("--prompt", type=int, default=128)
    add("--generate", type=int, default=16)
    add("--rounds", type=int, default=33, help="of the baseline")
    add("--max-regression", type=float, default=0.05)
    add("--time-limit", type=float, default=60.0, help="seconds of one check")
    add("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args(arguments)
    model = load("demo", dtype=options.dtype)
    prune(model, plan_of_widths(model, 0.5, 64), compensate="none")
    models = {"half": compact_modules(model)}
    sizes = {"prompt": options.prompt, "generate": options.generate, "batch": [1]}
    tests, more = gate.measured(models, **sizes)
    before = more(options.rounds, tests)
    answers: dict[str, Counter] = {kind: Counter() for kind in options.kind}
    trials = []
    for number in range(options.trials):
        for kind in options.kind:
            with ExitStack() as stack:
                stack.enter_context(busy() if "busy" in kind else nullcontext())
                change = slowed(models["half"], SLOWER) if "slower" in kind else nullcontext()
                stack.enter_context(change)
                begun = time.monotonic()
                _, more = gate.measured(models, **sizes)
                found = gate.decide(before, more, options.max_regression, options.time_limit)
            answers[kind][said(found)] += 1
            changes = {v.test: (round(v.change, 4), v.timings, v.verdict) for v in found}
            seconds = round(time.monotonic() - begun, 1)
            trials.append({"kind": kind, "said": said(found), "seconds": seconds, "tests": changes})
            each = ", ".join(
                f"{v.test.split(' batch')[0]} {v.change:+.1%} {v.verdict}" for v in found
            )
            print(f"{number + 1:3} {kind:16} {said(found):10} {seconds:5.1f} s  {each}", flush=True)
    wrong = failures(answers)
    options.out.mkdir(parents=True, exist_ok=True)
    counted = {kind: dict(each) for kind, each in answers.items()}
    facts = {"answers": counted, "failures": wrong, "trials": trials, "provenance": provenance()}
    write_json(options.out / "gate.json", facts)
    for kind, each in counted.items():
        print(f"{kind}: " + ", ".join(f"{name} {count}" for name, count in each.items()))
    for line in wrong:
        print(f"FAILED {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
