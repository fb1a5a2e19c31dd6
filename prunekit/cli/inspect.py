"""`prunekit inspect`: what is in a file or folder that prunekit wrote."""

from __future__ import annotations

from pathlib import Path

from prunekit import files
from prunekit.checkpoint import RECORD, read_record
from prunekit.cli.calibrate import describe_stats, summary
from prunekit.cli.output import Output, count, megabytes
from prunekit.config import InspectConfig
from prunekit.errors import InputError
from prunekit.plan import PrunePlan
from prunekit.stats import NeuronStats

CONFIG = InspectConfig
EXAMPLES = """  prunekit inspect task.stats
  prunekit inspect small
  prunekit inspect small/plan.safetensors --json"""


def run(config: InspectConfig, output: Output) -> int:
    """Recognise the path and describe it."""
    path = Path(config.path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        return _folder(path, output)
    kind = files.read_header(path).get("kind")
    if kind == "neuron-stats":
        stats = NeuronStats.load(path)
        describe_stats(stats, output)
        output.json({"kind": kind, **summary(stats)})
    elif kind == "prune-plan":
        _plan(PrunePlan.load(path), output)
    else:
        raise InputError(f"{path}: holds neither statistics nor a plan of prunekit")
    return 0


def _facts(record: dict) -> list[tuple[str, str]]:
    rows = [(key, str(value)) for key, value in record.items() if value not in (None, "")]
    return [(key.replace("_", " "), value) for key, value in rows]


def _plan(plan: PrunePlan, output: Output) -> None:
    widths = sorted(set(zip(plan.dense_widths, plan.widths(), strict=True)))
    rows = [
        ("MLPs", str(len(plan.kept))),
        ("widths", ", ".join(f"{dense} → {kept}" for dense, kept in widths)),
        ("sparsity reached", f"{plan.sparsity:.4f}"),
        *_facts({k: v for k, v in plan.recipe.items() if k != "fingerprint"}),
    ]
    output.table("prune plan", ("", "value"), rows)
    output.json(
        {
            "kind": "prune-plan",
            "widths": plan.widths(),
            "dense_widths": list(plan.dense_widths),
            "sparsity": plan.sparsity,
            "recipe": plan.recipe,
        }
    )


def _folder(path: Path, output: Output) -> int:
    if not (path / RECORD).is_file():
        raise InputError(f"{path}: no {RECORD}; it was not written by prunekit")
    record = read_record(path)
    widths = sorted(set(zip(record.get("dense_widths", []), record.get("widths", []), strict=True)))
    rows = [
        ("dense model", record.get("model", "")),
        ("parameters", count(record["parameters"])),
        ("size on disk", megabytes(record["bytes"])),
        ("dtype", record["dtype"]),
    ]
    if widths:
        rows.append(("widths", ", ".join(f"{dense} → {kept}" for dense, kept in widths)))
        rows.append(("sparsity reached", f"{record['sparsity']:.4f}"))
        rows += _facts({k: v for k, v in record["recipe"].items() if k != "fingerprint"})
    if recovery := record.get("recovery"):
        loss = recovery["loss"]
        what = f"{recovery['settings']['method']}, {recovery['steps']} steps"
        rows.append(("recovery", f"{what}: loss {loss['before']:.4f} → {loss['after']:.4f}"))
    output.table(f"model {path}", ("", "value"), rows)
    output.json({"kind": "model", **record})
    return 0
