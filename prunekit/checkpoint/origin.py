"""Where a model comes from: its id on the Hugging Face hub and its licence, as far as files say."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.values import parse_json

HUB = "https://huggingface.co"
_RECORD = "prunekit.json"
_CACHED = "models--"  # how the hub's cache names a model's folder


@dataclass(frozen=True)
class Origin:
    """What a model card says of the model that another was made from.

    Attributes:
        base_model: its id on the hub, ``owner/name``; None where nothing tells it.
        license: as the hub writes it, such as ``apache-2.0``, or ``other`` with the next two.
        license_name, license_link: of one that the hub has no word for.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    def metadata(self) -> dict[str, str]:
        """What is known, under the names that the hub reads in a card's front matter."""
        return {name: value for name, value in asdict(self).items() if value}


def origin(source: str) -> Origin:
    """Look up where a model comes from, without asking the network.

    Args:
        source: what it was loaded from: a folder, whose configuration, ``prunekit.json`` and
            README are read; a ``.gguf`` file, whose metadata are; or a hub id, whose README is if
            it is in the hub's cache. Anything else tells nothing.
    """
    path = Path(source)
    if source and path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path)
    if not is_hub_id(source):
        return Origin()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "README.md")
    said = front_matter(Path(found)) if isinstance(found, str) else {}
    return _licensed(Origin(source), said)


def is_hub_id(name: str) -> bool:
    """Whether a name is written as ``owner/name``, and is no path of this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def front_matter(readme: Path) -> dict[str, Any]:
    """The YAML at the head of a README; {} where there is none that can be read."""
    import yaml

    try:
        head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text("utf-8"), re.DOTALL)
        said = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return said if isinstance(said, dict) else {}


def _of_folder(folder: Path) -> Origin:
    config, record = _json(folder / "config.json"), _json(folder / _RECORD)
    if record:  # ours: what it was made from is what it says, and not itself
        known = {key: record.get(key) for key in Origin.__dataclass_fields__}
        return Origin(**{key: value for key, value in known.items() if isinstance(value, str)})
    named = config.get("_name_or_path")
    base = named if isinstance(named, str) and is_hub_id(named) else None
    for part in folder.absolute().parts:
        owner, _, name = part.removeprefix(_CACHED).partition("--")
        if part.startswith(_CACHED) and name:
            base = f"{owner}/{name}"
    return _licensed(Origin(base), config | front_matter(folder / "README.md"))


def _json(path: Path) -> dict[str, Any]:
    try:
        said = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _of_gguf(path: Path) -> Origin:
    from prunekit.checkpoint.gguf_read import read_gguf

    keys = read_gguf(path).keys

    def said(key: str) -> str | None:
        value = keys.get(f"general.{key}")
        return value if isinstance(value, str) else None

    url = said("source.repo_url") or said("base_model.0.repo_url") or ""
    name = url.removeprefix(f"{HUB}/").rstrip("/")
    facts = {"license": said("license"), "license_name": said("license.name")}
    facts["license_link"] = said("license.link")
    return _licensed(Origin(name if name != url and is_hub_id(name) else None), facts)


def _licensed(known: Origin, said: dict[str, Any]) -> Origin:
    """With the licence that a README, a configuration or a GGUF file tells of."""
    facts = {key: said.get(key) for key in ("license", "license_name", "license_link")}
    facts = {k: v.strip() for k, v in facts.items() if isinstance(v, str) and v.strip()}
    link = facts.get("license_link", "")
    if link and "://" not in link:  # a file beside the README, which is not beside ours
        facts.pop("license_link")
        if known.base_model:
            facts["license_link"] = f"{HUB}/{known.base_model}/blob/main/{link.removeprefix('./')}"
    return replace(known, **facts)
