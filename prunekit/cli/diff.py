"""`prunekit diff`: how two plans or two models differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from prunekit.checkpoint.diff import (
    Overlap,
    TensorDifferences,
    check_one_origin,
    diff_tensors,
    obstacle,
    overlaps,
    recipe_differences,
    total,
)
from prunekit.checkpoint.sides import Side, model_side, nested_side, plan_side
from prunekit.cli.output import Output, count, megabytes
from prunekit.config import DiffConfig
from prunekit.errors import InputError
from prunekit.integrations.loading import DEMO, load_shape, weights_folder
from prunekit.integrations.nested import is_nested
from prunekit.progress import progress_bar

CONFIG = DiffConfig
EXAMPLES = """  prunekit diff small smaller
  prunekit diff MODEL small
  prunekit diff small/plan.safetensors smaller/plan.safetensors
  prunekit diff nested small --sparsity 0.2"""


def run(config: DiffConfig, output: Output) -> int:
    """Open both, see that they are of one model, and say what differs."""
    a, b = _open(config)
    check_one_origin(a, b)
    neurons, recipe, why_not = overlaps(a, b), recipe_differences(a, b), obstacle(a, b)
    tensors = None if why_not else _tensors(config, a, b)
    output.line(f"A  {a.path}\nB  {b.path}")
    _sides(output, a, b, recipe)
    _neurons(output, a, b, neurons)
    if tensors is None:
        output.line(f"weights not compared: {why_not}")
    else:
        _weights(output, tensors, config.limit)
    output.json(
        {
            "a": _facts(a),
            "b": _facts(b),
            "dense_widths": list(a.dense_widths),
            "recipe": {key: list(values) for key, values in recipe.items()},
            "neurons": _neuron_facts(a, b, neurons),
            "tensors": None if tensors is None else dataclasses.asdict(tensors),
        }
    )
    return 0


def _open(config: DiffConfig) -> tuple[Side, Side]:
    paths = config.a, config.b
    nested = [is_nested(path) for path in paths]
    if config.sparsity is not None and not any(nested):
        raise InputError(f"--sparsity: neither {config.a} nor {config.b} is a nested checkpoint")
    sides: list[Any] = [None, None]
    for i in sorted(range(2), key=lambda i: nested[i]):  # a nested one takes the other's widths
        other = sides[1 - i]
        widths = None if other is None or all(nested) else other.widths
        sides[i] = _side(paths[i], nested[i], config.sparsity, widths)
    return sides[0], sides[1]


def _side(path: str, nested: bool, sparsity: float | None, widths) -> Side:
    if nested:
        return nested_side(path, load_shape(path), sparsity=sparsity, widths=widths)
    gguf = path == DEMO or Path(path).suffix == ".gguf"
    if Path(path).is_file() and not gguf:
        return plan_side(path)
    return model_side(path, load_shape(path), None if gguf else weights_folder(path))


def _tensors(config: DiffConfig, a: Side, b: Side) -> TensorDifferences:
    shared = a.weights.tensors.keys() & b.weights.tensors.keys()
    size = sum(side.weights.tensors[name].size for side in (a, b) for name in shared)
    with progress_bar(size, "diff", "B", quiet=config.quiet) as bar:
        return diff_tensors(a, b, bar.update)


def _facts(side: Side) -> dict[str, Any]:
    return {
        "path": side.path,
        "kind": side.kind,
        "model": side.record.get("model"),
        "sparsity": side.sparsity,
        "widths": list(side.widths),
        "parameters": side.parameters,
        "bytes": side.bytes,
        "dtype": side.dtype,
        "recipe": side.recipe,
    }


def _neuron_facts(a: Side, b: Side, found: list[Overlap] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    by_mlp = zip(_mlp_names(a, b), found, strict=True)
    return {
        **total(found).as_dict(),
        "by_mlp": [{"name": name, **part.as_dict()} for name, part in by_mlp],
    }


def _mlp_names(a: Side, b: Side) -> tuple[str, ...]:
    return a.names or b.names or tuple(f"MLP {i}" for i in range(len(a.widths)))


def _sides(output: Output, a: Side, b: Side, recipe: dict[str, tuple[Any, Any]]) -> None:
    def both(what: str, show) -> tuple[str, str, str]:
        return what, *("–" if (value := show(side)) in (None, "") else value for side in (a, b))

    rows = [
        both("kind", lambda side: side.kind),
        both("dense model", lambda side: side.record.get("model")),
        both("sparsity reached", lambda side: f"{side.sparsity:.4f}"),
        both("parameters", lambda side: side.parameters and count(side.parameters)),
        both("size on disk", lambda side: side.bytes and megabytes(side.bytes)),
        both("dtype", lambda side: side.dtype),
    ]
    rows = [row for row in rows if row[1:] != ("–", "–")]
    for key, values in recipe.items():
        what = "sparsity asked for" if key == "sparsity" else key.replace("_", " ")
        rows.append((what, *("–" if value is None else _shown(value) for value in values)))
    output.table("models, and what differs in their recipes", ("", "A", "B"), rows)


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{kind} {Path(name).name} ({digest})" for kind, name, digest in value)


def _neurons(output: Output, a: Side, b: Side, found: list[Overlap] | None) -> None:
    columns = ("MLP", "dense", "A", "B")
    rows = list(zip(_mlp_names(a, b), a.dense_widths, a.widths, b.widths, strict=True))
    rows.append(("all", *(sum(many) for many in (a.dense_widths, a.widths, b.widths))))
    if found is not None:
        columns += ("both keep", "only A", "only B", "Jaccard")
        rows = [
            (*row, part.both, part.only_a, part.only_b, f"{part.jaccard:.3f}")
            for row, part in zip(rows, [*found, total(found)], strict=True)
        ]
    output.table("neurons", columns, rows)
    if found is None:
        output.line("which neurons are kept is recorded in no plan.safetensors of theirs")


def _weights(output: Output, found: TensorDifferences, limit: int) -> None:
    same = found.compared - len(found.differing)
    parts = [f"{same} of {found.compared} tensors are the same in the neurons that both keep"]
    for names, what in (
        (found.only_a, "only in A"),
        (found.only_b, "only in B"),
        (found.reshaped, "of two shapes"),
    ):
        if names:
            parts.append(f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})")
    if found.differing:
        shown = found.differing[: limit or None]
        rows = [
            (
                d.name,
                "×".join(map(str, d.shape)),
                "–" if d.relative is None else f"{d.relative:.3e}",
                f"{d.largest:.3e}",
            )
            for d in shown
        ]
        rest = len(found.differing) - len(shown)
        if rest:
            rows.append((f"and {rest} that differ less (--limit 0 lists all)", "", "", ""))
        title = "weights that differ, of the neurons that both keep"
        output.table(title, ("tensor", "compared", "‖B - A‖ / ‖A‖", "max |B - A|"), rows)
    output.line("; ".join(parts))
