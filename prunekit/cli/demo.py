"""`prunekit demo`: the whole story on the embedded model, in minutes, on a laptop."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunekit.calibrate import calibrate
from prunekit.checkpoint import save, weight_bytes
from prunekit.cli.output import Output, count
from prunekit.compact import compact_modules
from prunekit.config import DemoConfig
from prunekit.contrast import against
from prunekit.evaluate import Loss, evaluate_loss
from prunekit.experiment.knee import shown
from prunekit.experiment.off_task import Spent, off_task_spent
from prunekit.experiment.variants import Outcome, Variant, run_variants
from prunekit.files import check_output_file, write_json
from prunekit.integrations.loading import DEMO, load, load_tokenizer
from prunekit.measure.comparison import bench_models
from prunekit.measure.memory import parameter_count, peak_memory
from prunekit.measure.provenance import provenance
from prunekit.progress import progress_bar
from prunekit.tasks.embedded import humaneval, word_problems

if TYPE_CHECKING:
    from prunekit.report.plots import Point

CONFIG = DemoConfig
EXAMPLES = """  prunekit demo
  prunekit demo --out /tmp/demo"""

_DEFAULT = "prunekit's default"
_VARIANTS = (
    *(Variant(_DEFAULT, s) for s in (0.2, 0.35, 0.5)),
    *(Variant("wanda + lstsq", s, "wanda", compensate="lstsq") for s in (0.2, 0.35, 0.5)),
    *(Variant("selectivity alone", s, "selectivity", compensate="none") for s in (0.1, 0.2)),
    *(Variant("random", s, "random", "random", "none", seed=33) for s in (0.1, 0.2)),
    *(Variant("reverse", s, "selectivity", "reverse", "none") for s in (0.1, 0.2)),
)
_SAVED = Variant(_DEFAULT, 0.2)
_TRADED = 0.35  # where the target's loss is set against the off-task loss
_DISTRACTOR, _OFF_TASK = 100, 24  # word problems that calibrate, and that measure the latter
_CURVE = tuple(
    Variant("wanda + lstsq", _TRADED, "wanda", compensate="lstsq", keep_off_task=knob)
    for knob in (0.25, 1.0)  # 0 is among the variants
)
_PROMPT, _GENERATE, _ROUNDS = 512, 48, 3
_COLUMNS = (
    "model",
    "removed",
    "loss ↓",
    "rise",
    "params",
    "disk\nMB",
    f"pp{_PROMPT}\nt/s",
    f"tg{_GENERATE}\nt/s",
    "×",
    f"tg{_GENERATE}\ndrop-in",
    "×",
    "peak\nMB",
)
_NOTE = (
    "Loss: nats a token on the solutions of HumanEval's odd problems, which calibration did not "
    "see. "
    f"pp: prefill of {_PROMPT} tokens; tg: decode of {_GENERATE} after them, batch 1, median of "
    f"{_ROUNDS} interleaved rounds, in plain transformers and with every MLP a CompactMLP "
    "(compact_modules) over the same weights; ×: speed-up over the dense model in plain "
    "transformers. Peak: what loading and running added to a fresh process, in plain transformers. "
    "Speed and memory depend on the width alone, so each width was measured once."
)


def run(config: DemoConfig, output: Output) -> int:
    """Calibrate, prune in every way, measure, save the best model and write the report."""
    begun = time.perf_counter()
    out = Path(config.out)
    check_output_file(out / "report.html")
    target, held_out = humaneval()
    distractor, off_task = word_problems(_DISTRACTOR), word_problems(_OFF_TASK, seed=1)
    tokenizer = load_tokenizer(DEMO)
    output.line("1/5 loading SmolLM2-135M-Instruct")
    dense = load(DEMO, dtype="bf16")
    output.line(
        f"2/5 calibrating on {len(target.examples)} coding problems, "
        f"contrasted with {len(distractor.examples)} word problems"
    )
    quiet = config.quiet
    stats = against(
        calibrate(dense, tokenizer, target, gram=True, gradients=True, quiet=quiet),
        calibrate(dense, tokenizer, distractor, gram=True, quiet=quiet),
    )
    ways = _VARIANTS + _CURVE
    output.line(f"3/5 pruning it in {len(ways)} ways, all from that one calibration")
    dense_loss = evaluate_loss(dense, tokenizer, held_out, quiet=quiet)
    outcomes = []
    with progress_bar(len(ways), "variants", "model", quiet=quiet) as bar:
        for outcome in run_variants(dense, tokenizer, stats, held_out, ways, quiet=True):
            outcomes.append(outcome)
            bar.update()
    traded = [o for o in outcomes if o.variant.sparsity == _TRADED]
    spent = list(off_task_spent(dense, dense_loss, tokenizer, off_task, traded))
    outcomes = outcomes[: len(_VARIANTS)]
    output.line("4/5 measuring speed and memory, dense and pruned in turn")
    measured = _measure(dense, tokenizer, outcomes)
    output.line("5/5 saving the model and the report\n")
    chosen = next(o for o in outcomes if o.variant == _SAVED)
    results = {"loss": [chosen.loss.as_dict()], "dense_loss": dense_loss.as_dict()}
    folder = save(chosen.model, tokenizer, out / "model", results=results, force=True)
    seconds = time.perf_counter() - begun
    rows = _rows(dense, dense_loss, outcomes, measured)
    output.table("SmolLM2-135M-Instruct, pruned for code", _COLUMNS, rows)
    note = f"{_NOTE} {_knees(dense_loss, outcomes)} {_spent_off_task(spent)}"
    output.line(note)
    facts = provenance(seconds=round(seconds))
    page = _report(out, rows, note, dense_loss, outcomes, measured, spent, facts)
    result = _result(dense_loss, outcomes, measured, facts)
    result["off_task"] = [asdict(s) for s in spent]
    write_json(out / "results.json", result)
    output.line(
        f"\n{facts['device']}; torch {facts['versions']['torch']}; {seconds:.0f} s in all\n"
        f"model:  {folder} ({_SAVED.name}, {chosen.sparsity:.1%} of the neurons removed)\n"
        f"report: {page}\n"
        f"next:   prunekit eval {folder} --data YOURS.jsonl\n"
        "        prunekit prune MODEL --target YOURS.jsonl --sparsity 0.2 -o small"
    )
    output.json(result)
    return 0


def _width(outcome: Outcome) -> int:
    return outcome.model.config.intermediate_size


def _measure(dense: nn.Module, tokenizer: Any, outcomes: list[Outcome]) -> dict[int, dict]:
    """Throughput, bytes on disk and peak memory of each width, the dense one first."""
    models = {dense.config.intermediate_size: dense}
    for outcome in outcomes:
        models.setdefault(_width(outcome), outcome.model)
    named = {str(width): model for width, model in models.items()}
    named |= {f"{width} drop-in": _drop_in(model) for width, model in models.items()}
    rows = bench_models(named, prompt=_PROMPT, generate=_GENERATE, rounds=_ROUNDS)
    found: dict[int, dict] = {width: {} for width in models}
    for row in rows:
        width, _, kind = row.model.partition(" ")
        found[int(width)][f"{row.test[:2]} {kind}".strip()] = asdict(row)
    for width, model in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = save(model, tokenizer, Path(scratch) / "model")
            found[width] |= peak_memory(folder, prompt=_PROMPT) | {"disk": weight_bytes(folder)}
    return found


def _drop_in(model: nn.Module) -> nn.Module:
    """A twin whose MLPs are CompactMLPs; it shares every weight with the model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return compact_modules(copy.deepcopy(model, shared))


def _rows(
    dense: nn.Module, dense_loss: Loss, outcomes: list[Outcome], measured: dict[int, dict]
) -> list[tuple[str, ...]]:
    every = [("dense", 0.0, dense_loss, dense)]
    every += [(o.variant.name, o.sparsity, o.loss, o.model) for o in outcomes]
    rows = []
    for name, sparsity, loss, model in every:
        m = measured[model.config.intermediate_size]
        rows.append(
            (
                name,
                f"{sparsity:.1%}",
                f"{loss.loss:.3f}",
                f"{loss.loss - dense_loss.loss:+.3f}",
                count(parameter_count(model)),
                f"{m['disk'] / 1e6:.0f}",
                f"{m['pp']['tokens_per_s']:.0f}",
                f"{m['tg']['tokens_per_s']:.1f}",
                f"{m['tg']['speedup']:.2f}",
                f"{m['tg drop-in']['tokens_per_s']:.1f}",
                f"{m['tg drop-in']['speedup']:.2f}",
                f"{m['peak_bytes'] / 1e6:.0f}",
            )
        )
    return rows


def _knees(dense_loss: Loss, outcomes: list[Outcome]) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for o in outcomes:
        rise = o.loss.loss - dense_loss.loss
        points.setdefault(o.variant.name, []).append((o.sparsity, rise))
    found = ", ".join(f"{name} {shown(many)}" for name, many in points.items())
    return f"Robustness knee, where perplexity has risen by 5 %: {found} of the neurons removed."


def _spent_off_task(spent: list[Spent]) -> str:
    plain = [s for s in spent if not s.keep_off_task]
    found = ", ".join(f"{s.name} {s.off_task:+.3f}" for s in plain)
    return f"Off task, with {plain[0].sparsity:.0%} removed, other word problems lose: {found}."


def _lines(outcomes: list[Outcome], measured: dict[int, dict]) -> dict[str, list[Point]]:
    from prunekit.report.plots import Point

    lines: dict[str, list[Point]] = {}
    for o in outcomes:
        speed = measured[_width(o)]["tg"]["tokens_per_s"]
        lines.setdefault(o.variant.name, []).append(Point(o.sparsity, o.loss.loss, speed))
    return lines


def _report(out, rows, note, dense_loss, outcomes, measured, spent, facts) -> Path:
    # Not on every start of the command line: the plotting library takes most of a second.
    from prunekit.report.page import Table, write_report
    from prunekit.report.plots import Point, loss_by_sparsity, loss_by_speed, loss_off_task

    dense_speed = next(iter(measured.values()))["tg"]["tokens_per_s"]
    dense = Point(0.0, dense_loss.loss, dense_speed)
    lines = _lines(outcomes, measured)
    plots = {
        "Loss by sparsity": loss_by_sparsity(lines, dense),
        "Loss by measured speed": loss_by_speed(lines, dense),
        f"Coding against word problems, {spent[0].sparsity:.0%} removed, by --keep-off-task": (
            loss_off_task(spent)
        ),
    }
    lead = (
        "A 135M-parameter chat model was run over 82 coding problems and 100 word problems; from "
        "that one calibration its MLP neurons were removed in several ways, without training. "
        "The default removes what the other neurons can best stand in for, by its effect on the "
        "loss, and solves each layer's down projection anew on what the pruned layers before it "
        "give. wanda + lstsq takes seconds: it keeps the neurons that add most on the task and "
        "repairs each layer for itself. selectivity alone, random and reverse are the controls of "
        "arXiv 2604.27115. What the word problems lose is what the model forgets for the task; "
        "--keep-off-task says how dear it is."
    )
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    footer = {k: v for k, v in facts.items() if k != "versions"} | {"versions": versions}
    title = "SmolLM2-135M-Instruct, pruned for code"
    table = Table(_COLUMNS, rows, note)
    return write_report(
        out / "report.html", title=title, lead=lead, table=table, plots=plots, facts=footer
    )


def _result(dense_loss: Loss, outcomes: list[Outcome], measured, facts) -> dict[str, Any]:
    return {
        "dense": dense_loss.as_dict(),
        "variants": [
            {
                **asdict(o.variant),
                "sparsity_reached": o.sparsity,
                "width": _width(o),
                "loss": o.loss.as_dict(),
                "prune_seconds": o.seconds,
            }
            for o in outcomes
        ],
        "by_width": measured,
        "provenance": facts,
    }
