"""The model card of a checkpoint, from its record: front matter for the hub, and what to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2
import yaml

from prunekit.checkpoint.origin import HUB

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prunekit.checkpoint", "."),
    autoescape=False,  # Markdown, not HTML
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
_OF_ORIGIN = ("base_model", "license", "license_name", "license_link")


def _short(name: str) -> str:
    """A corpus's or model's name without folders, as it may stand in a table."""
    parts = name.split(" + ")
    bare = [p if p.startswith("hf:") else p.rstrip("/").split("/")[-1] for p in parts]
    return " + ".join(bare).replace("|", "\\|")


_TEMPLATES.filters["short"] = _short


def model_card(record: dict[str, Any]) -> str:
    """Render the Markdown card that says what the model is and how it was made.

    Args:
        record: of a saved model, as `save` writes it.
    """
    said = dict.fromkeys(_OF_ORIGIN) | record
    base, name = said["base_model"], _short(record["model"])
    pruned = "widths" in record
    return _TEMPLATES.get_template("card.md.j2").render(
        record=said,
        pruned=pruned,
        by_layer=record.get("widths_differ", False),
        name=name or record["model_type"],
        dense=f"[{base}]({HUB}/{base})" if base else name or "the dense model",
        front_matter=yaml.safe_dump(_metadata(record), sort_keys=False, allow_unicode=True).strip(),
        corpora=list(corpora(record.get("calibration") or {})),
        anchors=_anchors(record),
        dense_loss=_dense_loss(record["results"]),
    )


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    """The front matter, under the names that the hub reads."""
    plain = "nested" not in record
    facts: dict[str, Any] = {"library_name": "transformers" if plain else "prunekit"}
    facts["pipeline_tag"] = "text-generation"
    facts |= {key: record[key] for key in _OF_ORIGIN if record.get(key)}
    return facts | {"tags": ["prunekit", *(["pruned"] if "widths" in record else [])]}


def corpora(provenance: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The corpora of a calibration, or of several that were merged."""
    yield from provenance.get("corpora", [])
    for part in provenance.get("merged", []):
        yield from corpora(part)


def _anchors(record: dict[str, Any]) -> list[str]:
    """The sparsities for which a nested checkpoint holds repairs."""
    nested = record.get("nested") or {"anchors": [], "dense_widths": []}
    total = sum(nested["dense_widths"])
    return [f"{1 - sum(widths) / total:.1%} removed" for widths in nested["anchors"]]


def _dense_loss(results: dict[str, Any]) -> float | None:
    """The dense model's loss, where it was measured on the one corpus that the pruned one was."""
    if len(results.get("loss", [])) != 1:
        return None
    whole = results.get("dense_loss") or {}
    return whole.get("loss", (results.get("search") or {}).get("dense_loss"))
