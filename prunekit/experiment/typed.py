"""Plain values, as YAML and JSON give them, become frozen dataclasses, or one line says why not."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from prunekit.errors import InputError

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def value(default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A field with limits: ``least`` and ``most``, ``above`` and ``below``, or ``one_of``."""
    return dataclasses.field(default=default, metadata=limits)


def read(kind: type, given: Any, where: str = "") -> Any:
    """Build a dataclass from a mapping; a text alone is its first field.

    Args:
        kind: a dataclass whose fields are int, float, str, bool, dataclasses, tuples of these, or
            one of these or None.
        given: the mapping.
        where: the key it stands at, for messages.

    Raises:
        InputError: an unknown or missing key, a wrong type, or a value out of range; names the key.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if isinstance(given, str) and where:
        given = {next(iter(fields)): given}
    if not isinstance(given, dict):
        raise InputError(f"{where or kind.__name__}: got {_shown(given)}; expected keys and values")
    hints = get_type_hints(kind)
    values = {}
    for key, content in given.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(fields)}"
            raise InputError(f"{place}: unknown key; {hint}")
        values[key] = _value(hints[key], content, place, fields[key].metadata)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{f'{where}.{name}' if where else name}: is missing")
    return kind(**values)


def _value(kind: Any, given: Any, where: str, limits: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        if given is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple:
        many = given if isinstance(given, list) else [given]
        if given is None:
            raise InputError(f"{where}: got nothing; expected a list")
        each = get_args(kind)[0]
        return tuple(_value(each, v, f"{where}[{i}]", limits) for i, v in enumerate(many))
    if dataclasses.is_dataclass(kind):
        return read(kind, given, where)
    if kind is float and type(given) is int:
        given = float(given)
    if type(given) is not kind or (kind is float and not math.isfinite(given)):
        raise InputError(f"{where}: got {_shown(given)}; expected {_WORDS[kind]}")
    _check(given, where, limits)
    return given


_RULES = {
    "least": ("at least", lambda given, limit: given >= limit),
    "above": ("more than", lambda given, limit: given > limit),
    "most": ("at most", lambda given, limit: given <= limit),
    "below": ("less than", lambda given, limit: given < limit),
}


def _check(given: Any, where: str, limits: Any) -> None:
    if "one_of" in limits and given not in limits["one_of"]:
        raise InputError(f"{where}: got {given!r}; expected one of {', '.join(limits['one_of'])}")
    bounds = [
        (words, test, limits[rule]) for rule, (words, test) in _RULES.items() if rule in limits
    ]
    if not all(test(given, limit) for _, test, limit in bounds):
        expected = " and ".join(f"{words} {limit:g}" for words, _, limit in bounds)
        raise InputError(f"{where}: got {given!r}; expected {expected}")


def _shown(given: Any) -> str:
    text = "nothing" if given is None else repr(given)
    return text if len(text) < 60 else f"{text[:57]}..."
