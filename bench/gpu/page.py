"""python -m bench.gpu.page: the tables of docs/gpu.md, from bench/results alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.gpu.model import OURS, PLAIN
from bench.gpu.results import MEASURED, SCHEMA, WrongError
from bench.markers import rewrite
from prunekit.errors import InputError
from prunekit.files import read_json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "bench" / "results"
MARKERS, MODEL_MARKERS = "gpu-table", "gpu-models"

NOT_MEASURED = """\
**Not measured yet.** `make gpu-bench` checks and times everything on the GPU it finds and writes
`bench/results/<device>.json`; `make gpu-table` makes this section of it, and of nothing else."""

_HEAD = """\
| | T | model | width | ms | p25-p75 | over dense | over torch | over the fastest rival | GB/s | \
TFLOP/s | of peak |
|---|---|---|---|---|---|---|---|---|---|---|---|"""

_MODELS_HEAD = """\
| | model | width | parameters | transformers, ms | over dense | prunekit, ms | over dense |
|---|---|---|---|---|---|---|---|"""

Entry = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    """Read the results of a run on a GPU.

    Raises:
        InputError: the file is of another kind or schema.
    """
    value = read_json(path)
    if value.get("kind") != MEASURED:
        raise InputError(
            f"{path}: is a {value.get('kind', 'file of unknown kind')}, expected results of kind "
            f"{MEASURED!r}; only what a GPU measured belongs here: remove it"
        )
    if value.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: has schema {value.get('schema')}, expected {SCHEMA}; measure again"
        )
    return value


def section(folder: Path) -> str:
    """Return the table of the operations, for the results in a folder."""
    devices = [_device(load(path)) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(devices) or NOT_MEASURED


def models(folder: Path) -> str:
    """Return the table of whole models, for the results of bench.gpu.model in a folder."""
    devices = [_models_of(load(path)) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(devices) or "**Not measured yet.** `python -m bench.gpu.model` does it."


def _models_of(value: dict[str, Any]) -> str:
    at = {(r["model"], r["test"], r["width"], r["way"]): r for r in value["rows"]}
    lines = [f"**{value['environment']['device']}**, bfloat16", "", _MODELS_HEAD]
    for model, test, width, way in at:
        if way != PLAIN:
            continue
        plain, ours = at[model, test, width, PLAIN], at[model, test, width, OURS]
        dense = max(w for m, t, w, _ in at if (m, t) == (model, test))
        base = at[model, test, dense, PLAIN]["median"]
        cells = [test, model, width, f"{plain['parameters'] / 1e9:.2f} B"]
        cells += [f"{plain['median'] * 1e3:.2f}", f"{base / plain['median']:.2f} ×"]
        # Many tokens go through torch's products either way.
        decodes = test.startswith("decode")
        mine = f"{ours['median'] * 1e3:.2f}", f"{base / ours['median']:.2f} ×"
        cells += mine if decodes else "––"
        lines.append(_line(cells))
    return "\n".join([*lines, "", _provenance(value["environment"]) + "."])


def _device(value: dict[str, Any]) -> str:
    entries = list(value["entries"].values())
    wrong = {(e["workload"], e["dtype"]) for e in entries if _is_wrong(e)}
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if entry.get("kind") == "speed":
            at = entry["workload"], entry["tokens"], entry["model"], entry["dtype"]
            groups.setdefault(at, []).append(entry)
    rows = [_row(group, (at[0], at[3]) in wrong) for at, group in groups.items()]
    about = value["environment"]
    dtypes = ", ".join(sorted({at[3] for at in groups}))
    return "\n".join([f"**{about['device']}**, {dtypes}", "", _HEAD, *rows, "", _footer(value)])


def _is_wrong(entry: Entry) -> bool:
    """Whether an operation failed a check; that memory ran out, say, is a failure of one timing."""
    error = entry.get("error", "")
    return bool(error) and (entry.get("kind") == "check" or WrongError.__name__ in error)


def _row(group: list[Entry], wrong: bool) -> str:
    """One operation on one model: its narrowest width, against torch and against the dense one."""
    pruned = min(group, key=lambda e: e["width"])
    cells = [pruned["workload"], pruned["tokens"], pruned["model"], pruned["width"]]
    if wrong or "contenders" not in pruned:
        return _line([*cells, "fails its check" if wrong else "failed", *[""] * 7])
    contenders = pruned["contenders"]
    ours = contenders["ours"]
    dense = next((e for e in group if e["width"] == e["dense"] and "contenders" in e), None)
    gain = "–"
    if dense is not None and dense is not pruned:
        gain = f"{dense['contenders']['ours']['median'] / ours['median']:.2f} ×"
    rivals = {name: c["median"] for name, c in contenders.items() if name != "ours"}
    fastest = min(rivals, key=rivals.get)
    return _line(
        [
            *cells,
            f"{ours['median'] * 1e3:.4g}",
            f"{ours['low'] * 1e3:.4g}-{ours['high'] * 1e3:.4g}",
            gain,
            f"{rivals['torch'] / ours['median']:.2f} ×",
            f"{rivals[fastest] / ours['median']:.2f} × ({fastest})",
            f"{ours['gb_s']:.0f}",
            f"{ours['tflop_s']:.0f}" if pruned["flops"] else "–",
            "–" if ours["share"] is None else f"{ours['share']:.0%}",
        ]
    )


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _provenance(about: dict[str, Any]) -> str:
    """Card, driver, versions, revision and command, as one sentence."""
    card, versions = about["card"], about["versions"]
    changed = {True: " with changes", False: "", None: " (no git tree)"}[about["dirty"]]
    facts = [
        f"driver {card['driver_version']}" if card else None,
        f"clocks up to {card['clocks.max.sm']}" if card else None,
        f"power limit {card['power.limit']}" if card else None,
        f"CUDA {about['cuda']}" if about["cuda"] else None,
        f"ROCm {about['hip']}" if about["hip"] else None,
        f"torch {versions['torch']}",
        f"Triton {versions['triton']}",
        f"prunekit {about['revision'] or 'of unknown revision'}{changed}",
        f"`{about['command']}`",
    ]
    return ", ".join(fact for fact in facts if fact)


def _footer(value: dict[str, Any]) -> str:
    entries = value["entries"].values()
    failed = sum("error" in e for e in entries)
    ends = [f"{failed} of {len(entries)} checks and timings failed." if failed else "No failures."]
    if value.get("left_out"):
        ends.append(f"{len(value['left_out'])} were left out for want of time.")
    return (
        "Medians of runs from cold caches, contenders in turn; decode in a CUDA graph over layers "
        "that no cache holds. × is how many times as long the other takes, dense being prunekit's "
        "own at the model's full width; GB/s and TFLOP/s count what the result takes at least.\n\n"
        + _provenance(value["environment"])
        + ". "
        + " ".join(ends)
    )


def main() -> int:
    try:
        rewrite(PAGE, MARKERS, section(RESULTS))
        rewrite(PAGE, MODEL_MARKERS, models(RESULTS / "models"))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
