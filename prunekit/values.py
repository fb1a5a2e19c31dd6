"""Values out of files that nobody vouches for: JSON, and whether it has the shape it should."""

from __future__ import annotations

import json
from typing import Any

_LARGEST = 2**63  # of whole numbers: more cannot be counted, and some cannot be divided

# A type; int and float take no bool, and float takes whole numbers. None. [shape], a list of any
# length. {name: shape}, a dict with at least these; what ends in ? may be missing. {str: shape}, a
# dict of any names. A tuple of shapes: one of them.
Shape = Any


def parse_json(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, or nested deeper than anything that prunekit reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def conform(value: Any, shape: Shape, name: str = "value") -> None:
    """Hold a value against a shape.

    Raises:
        ValueError: it has another; the message says where.
    """
    if isinstance(shape, tuple):
        if not any(_conforms(value, each) for each in shape):
            raise ValueError(f"{name}: is none of what it may be")
    elif isinstance(shape, list):
        _typed(value, list, name)
        for number, each in enumerate(value):
            conform(each, shape[0], f"{name}[{number}]")
    elif isinstance(shape, dict):
        _typed(value, dict, name)
        if str in shape:
            for key, each in value.items():
                conform(each, shape[str], f"{name}.{key}")
            return
        for key, inner in shape.items():
            known = key.rstrip("?")
            if known in value:
                conform(value[known], inner, f"{name}.{known}")
            elif known == key:
                raise ValueError(f"{name} lacks {key}")
    elif shape is None:
        if value is not None:
            raise ValueError(f"{name}: got {type(value).__name__}; expected null")
    else:
        _typed(value, shape, name)


def _conforms(value: Any, shape: Shape) -> bool:
    try:
        conform(value, shape)
    except ValueError:
        return False
    return True


def _typed(value: Any, kind: type, name: str) -> None:
    fits = type(value) is kind or (kind is float and type(value) is int) or kind is object
    if not fits:
        raise ValueError(f"{name}: got {type(value).__name__}; expected {kind.__name__}")
    if type(value) is int and abs(value) >= _LARGEST:
        raise ValueError(f"{name}: got a number of {len(str(abs(value)))} digits")
