"""Command lines from the dataclasses of `prunekit.config`: one definition, one help."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_args, get_type_hints


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


_number_or_auto.__name__ = "int or auto"  # what argparse calls it in an error

_TYPES: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    int | None: int,  # None: not given
    float | None: float,
    int | str: _number_or_auto,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Give a parser every field of a config: positionals, flags, defaults and help."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        facts = field.metadata
        help_text = facts["help"].replace("%", "%%")
        if facts.get("positional"):
            parser.add_argument(field.name, metavar=facts["metavar"], help=help_text)
            continue
        flags = [*filter(None, [facts["short"]]), "--" + field.name.replace("_", "-")]
        if hints[field.name] is bool:
            parser.add_argument(*flags, action="store_true", dest=field.name, help=help_text)
            continue
        options: dict[str, Any] = {"default": field.default, "dest": field.name}
        hint = hints[field.name]
        if facts["choices"]:
            options["choices"] = facts["choices"]
        else:
            options["metavar"] = facts["metavar"] or field.name.upper()
        if isinstance(field.default, tuple):
            options |= {"action": "extend", "nargs": "+", "default": None}
            options["type"] = _TYPES[get_args(hint)[0]]
        else:
            options["type"] = _TYPES[hint]
            if field.default not in ("", None, 0, 0.0):
                help_text += f" (default {field.default})"
        parser.add_argument(*flags, help=help_text, **options)


def to_config(namespace: argparse.Namespace, config: type) -> Any:
    """Build the config from parsed arguments."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(namespace, field.name)
        values[field.name] = tuple(value or ()) if isinstance(field.default, tuple) else value
    return config(**values)
