"""A sweep's results as one table: for the page, and as CSV, JSON and Markdown beside it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from prunekit.experiment.analysis import TARGET, Pooled, Run
from prunekit.experiment.claims import Claim
from prunekit.experiment.statistics import Interval
from prunekit.files import replacing_file, write_json
from prunekit.report.page import Table


def records(run: Run) -> list[dict[str, Any]]:
    """One flat record a model, seeds together; the dense model first. None: not measured."""
    found = [{"model": "dense", **_record(run, run.dense)}]
    for way, points in run.ways.items():
        found += [{"model": way.label, **asdict(way), **_record(run, point)} for point in points]
    columns = list(dict.fromkeys(name for record in found for name in record))
    return [{name: record.get(name) for name in columns} for record in found]


def _record(run: Run, point: Pooled) -> dict[str, Any]:
    speed = run.speed.get(str(point.widths[0]), {})
    first = point.rows[0]
    seeds = [row["cell"]["seed"] for row in point.rows]
    record: dict[str, Any] = {
        "sparsity_asked": point.asked,
        "sparsity": point.sparsity,
        "width": point.widths[0],
        "seeds": " ".join(map(str, seeds)),
        "parameters": first["parameters"],
        "bytes": first["bytes"],
    }
    for task, found in point.accuracy.items():
        record |= _ends(f"accuracy {task}", found)
        for kind in ("wrong", "unparsable", "empty", "repetition", "trap"):
            record[f"{kind} {task}"] = point.failures[task].get(kind, 0)
        record[f"answers {task}"] = sum(map(len, point.correct[task]))
    for corpus, found in point.loss.items():
        record |= _ends(f"loss {corpus}", found)
        record[f"rise {corpus}"] = point.rise(run.dense, corpus)
    for test in ("pp", "tg"):
        for name in ("tokens_per_s", "speedup"):
            record[f"{test} {name}"] = speed.get(test, {}).get(name)
    record["peak_bytes"] = speed.get("memory", {}).get("peak_bytes")
    for name in ("prune", "recover", "evaluate"):
        record[f"{name} seconds"] = fmean(row["seconds"][name] for row in point.rows)
    return record


def _ends(name: str, found: Interval | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name} low": None, f"{name} high": None}
    return {name: found.value, f"{name} low": found.low, f"{name} high": found.high}


def table(run: Run, found: Sequence[dict[str, Any]]) -> Table:
    """The records as people read them."""
    columns = ["model", "removed\n%", "params\nM"]
    columns += [f"{task}\naccuracy (95 %)" for task in run.tasks]
    columns += [f"loss\n{_short(corpus)}" for corpus in run.corpora] + ["rise"]
    measured = [c for c in _MEASURED if any(record[c[1]] is not None for record in found)]
    columns += [name for name, *_ in measured] + ["prune\ns"]
    rows = []
    for r in found:
        row = [r["model"], f"{100 * r['sparsity']:.1f}", f"{r['parameters'] / 1e6:.1f}"]
        for task in run.tasks:
            low, high = (r[f"accuracy {task} {end}"] for end in ("low", "high"))
            row.append(f"{r[f'accuracy {task}']:.3f} ({low:.2f} – {high:.2f})")
        row += [_number(r[f"loss {corpus}"], "{:.3f}") for corpus in run.corpora]
        row.append(_number(r[f"rise {TARGET}"], "{:+.3f}"))
        row += [_number(r[key], form, scale) for _, key, form, scale in measured]
        rows.append((*row, f"{r['prune seconds']:.1f}"))
    return Table(columns, rows, _note(run))


_MEASURED = (
    ("prefill\nt/s", "pp tokens_per_s", "{:.0f}", 1.0),
    ("decode\nt/s", "tg tokens_per_s", "{:.1f}", 1.0),
    ("×", "tg speedup", "{:.2f}", 1.0),
    ("peak\nMB", "peak_bytes", "{:.0f}", 1e6),
)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else form.format(value / scale)


def _short(corpus: str) -> str:
    name = corpus.removeprefix("hf:").split(":")[0] if corpus.startswith("hf:") else corpus
    return name.rsplit("/", 1)[-1]


def _note(run: Run) -> str:
    m = run.protocol["measure"]
    text = (
        "Accuracy: share of the problems solved, with 95 % bootstrap intervals over problems and "
        "seeds. Loss: nats a token on text that did not calibrate; –: not finite. Rise: of the "
        "target's loss over the dense model's. Seeds are averaged."
    )
    if run.speed:
        text += (
            f" Speed: batch 1, {m['prompt']} tokens read, {m['generate']} decoded, median of "
            f"{m['rounds']} rounds in turn with the dense model, plain transformers; ×: decoding "
            "against the dense model. Peak: what loading and running add to a fresh process. Both "
            "depend on the width alone and were measured once a width."
        )
    return text


def write_beside(
    page: Path, run: Run, found: Sequence[dict[str, Any]], said: Sequence[Claim]
) -> None:
    """Write what the page shows beside it, as CSV, JSON and Markdown."""
    with replacing_file(page.with_suffix(".csv")) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    facts = {"protocol": run.protocol, "runs": run.runs, "models": list(found)}
    facts |= {"claims": [asdict(claim) for claim in said], "speed": run.speed}
    write_json(page.with_suffix(".json"), facts)
    with replacing_file(page.with_suffix(".md")) as path:
        path.write_text(markdown(run, table(run, found), said))


def markdown(run: Run, results: Table, said: Sequence[Claim]) -> str:
    """The claims and the table as Markdown."""
    lines = [f"# {run.protocol['name']}", "", run.protocol["about"], ""]
    for claim in said:
        subject = f" ({claim.subject})" if claim.subject else ""
        lines.append(f"- **{claim.title}**{subject}: **{claim.verdict}**. {claim.text}")
    columns = [column.replace("\n", " ") for column in results.columns]
    rule = ["---", *["---:"] * (len(columns) - 1)]
    rows = [columns, rule, *results.rows]
    lines += ["", *(f"| {' | '.join(row)} |" for row in rows), "", results.note, ""]
    return "\n".join(lines)
