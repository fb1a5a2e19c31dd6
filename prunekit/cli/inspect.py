"""`prunekit inspect`: what is in a file or folder that prunekit wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunekit import files
from prunekit.checkpoint import RECORD, read_record, verify
from prunekit.checkpoint.nested import Nested
from prunekit.checkpoint.widths import differ
from prunekit.cli.calibrate import describe_stats, summary
from prunekit.cli.gguf import inspect_gguf
from prunekit.cli.output import Output, count, megabytes
from prunekit.config import InspectConfig
from prunekit.errors import InputError
from prunekit.integrations.nested import is_nested
from prunekit.plan import PrunePlan
from prunekit.stats import NeuronStats

CONFIG = InspectConfig
EXAMPLES = """  prunekit inspect task.stats
  prunekit inspect small
  prunekit inspect small --verify
  prunekit inspect small.gguf
  prunekit inspect small/plan.safetensors --json"""


def run(config: InspectConfig, output: Output) -> int:
    """Recognise the path and describe it."""
    path = Path(config.path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        return _folder(path, output, verified=verify(path) if config.verify else None)
    if path.suffix == ".gguf":
        if config.verify:
            raise InputError(f"{path}: --verify: GGUF files carry no hashes")
        return inspect_gguf(path, output)
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


def _widths(dense_widths: Sequence[int], widths: Sequence[int]) -> str:
    pairs = sorted(set(zip(dense_widths, widths, strict=True)))
    if differ(dense_widths, widths):
        dense = ", ".join(map(str, sorted(set(dense_widths))))
        return f"{dense} → by layer {', '.join(map(str, widths))}"
    return ", ".join(f"{dense} → {kept}" for dense, kept in pairs)


def _plan(plan: PrunePlan, output: Output) -> None:
    rows = [
        ("MLPs", str(len(plan.kept))),
        ("widths", _widths(plan.dense_widths, plan.widths())),
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


def _nested(nested: Nested, output: Output, verified: int | None) -> int:
    facts = nested.facts
    dense, total = facts["dense_widths"], sum(facts["dense_widths"])
    anchors = [1 - sum(widths) / total for widths in nested.anchors]
    size = sum(entry.size for entry in nested.entries.values())
    rows = [
        ("MLPs", str(len(dense))),
        ("dense widths", ", ".join(map(str, sorted(set(dense))))),
        ("repaired at", ", ".join(f"{s:.1%} removed" for s in anchors) or "no sparsity"),
        ("tensors", megabytes(size)),
        *_facts({k: v for k, v in facts["recipe"].items() if k != "fingerprint"}),
        *_verified(verified),
    ]
    output.table(f"nested checkpoint {nested.folder}", ("", "value"), rows)
    said = {"kind": "nested", "verified": verified, "dense_widths": dense, "anchors": anchors}
    output.json(said | facts["recipe"])
    return 0


def _verified(count: int | None) -> list[tuple[str, str]]:
    return [] if count is None else [("verified", f"{count} tensors are what was written")]


def _folder(path: Path, output: Output, verified: int | None) -> int:
    if is_nested(path):
        return _nested(Nested.open(path), output, verified)
    if not (path / RECORD).is_file():
        raise InputError(f"{path}: no {RECORD}; it was not written by prunekit")
    record = read_record(path)
    rows = [
        ("dense model", record.get("model", "")),
        ("parameters", count(record["parameters"])),
        ("size on disk", megabytes(record["bytes"])),
        ("dtype", record["dtype"]),
    ]
    if "widths" in record:
        rows.append(("widths", _widths(record["dense_widths"], record["widths"])))
        rows.append(("sparsity reached", f"{record['sparsity']:.4f}"))
        rows += _facts({k: v for k, v in record["recipe"].items() if k != "fingerprint"})
    rows += _verified(verified)
    if recovery := record.get("recovery"):
        loss = recovery["loss"]
        what = f"{recovery['settings']['method']}, {recovery['steps']} steps"
        rows.append(("recovery", f"{what}: loss {loss['before']:.4f} → {loss['after']:.4f}"))
    output.table(f"model {path}", ("", "value"), rows)
    output.json({"kind": "model", "verified": verified, **record})
    return 0
