"""The model card of a pruned checkpoint, from its record."""

from __future__ import annotations

from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prunekit.checkpoint", "."),
    autoescape=False,  # Markdown, not HTML
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def model_card(record: dict[str, Any]) -> str:
    """Render the Markdown card that says what the model is and how it was made."""
    return _TEMPLATES.get_template("card.md.j2").render(record=record)
