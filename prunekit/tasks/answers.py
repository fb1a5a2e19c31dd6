"""Finds an answer in a text, and compares answers as mathematics."""

from __future__ import annotations

import re
from decimal import Decimal

from prunekit.errors import InputError

# A sign after a digit, a letter or a bracket subtracts.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_SIGN, _UNIT = re.compile(r"\\?[$%€£]"), re.compile(r"\s+[A-Za-z][A-Za-z ]*$")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_BOXED = "\\boxed{"


def without_calculator(text: str) -> str:
    """The text without GSM8K's calculator marks, such as <<48/2=24>>."""
    return _CALCULATOR.sub("", text)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} whose braces close, if there is one."""
    start = len(text)
    while (start := text.rfind(_BOXED, 0, start)) >= 0:
        depth, first = 1, start + len(_BOXED)
        for place in range(first, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[first:place].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number of a text, as it stands there, thousands separated by commas or not."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def as_number(text: str) -> Decimal | None:
    """The value of a text that is a number, with a currency, a per cent sign, a unit, or none."""
    plain = _UNIT.sub("", _SIGN.sub("", text).strip().rstrip("."))
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


def check_math_verify(task: str) -> None:
    """Make sure, before long work, that answers other than plain numbers can be compared.

    Raises:
        InputError: the package math-verify is not installed.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise InputError(
            f"{task}: math-verify is not installed; pip install 'prunekit[tasks]'"
        ) from None


def equivalent(gold: str, found: str) -> bool | None:
    """Whether two answers are the same number or, by math-verify, the same mathematics.

    Returns:
        None where ``found`` is no mathematics at all.
    """
    left, right = as_number(gold), as_number(found)
    if left is not None and right is not None:
        return left == right
    from math_verify import parse, verify

    parsed = parse(f"${found}$")
    return verify(parse(f"${gold}$"), parsed) if parsed else None
