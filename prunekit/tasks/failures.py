"""How a continuation fails, each in one way: the first of the kinds below that fits.

- ``empty``: it ended, and holds nothing but white space.
- ``repetition``: its tail is one unit over and over (`repeats`), whether or not it ended.
- ``trap``: it reached the limit of new tokens without ending, and does not repeat itself.
- ``unparsable``: it ended, but holds nothing that its task could take for an answer.
- ``wrong``: it holds an answer, which is not the right one.

A continuation that is correct fails in no way, even where it then ran on to the limit. The paper
(arXiv 2604.27115) calls a trap whatever reaches the limit, loops and correct answers among it:
`TaskResult.unended` counts those.
"""

from __future__ import annotations

import re

FAILURES = ("trap", "repetition", "empty", "unparsable", "wrong")

_TIMES, _CHARACTERS = 4, 24
_NUMBER = re.compile(r"\d+")


def repeats(text: str) -> bool:
    """Whether the tail is one unit at least 4 times, and at least 24 characters long in all.

    A unit may be of any length up to a quarter of the text. White space at the end does not count,
    and units that differ in their numbers alone are one: models count their loops.

    Cost:
        O(n²) characters at worst, where n is the text's length; O(n) where its tail is varied.
    """
    text = text.rstrip()
    return _loops(text) or _loops(_NUMBER.sub("0", text))


def _loops(text: str) -> bool:
    for unit in range(1, len(text) // _TIMES + 1):
        length = max(_TIMES * unit, _CHARACTERS)
        tail = text[-length:]
        if len(tail) == length and tail[unit:] == tail[:-unit]:
            return True
    return False


def failure_kind(text: str, *, ended: bool, parsed: bool) -> str:
    """Name the way in which a continuation that is not correct fails.

    Args:
        text: the continuation.
        ended: whether it ended by itself, before the limit of new tokens.
        parsed: whether its task found an answer in it.
    """
    if ended and not text.strip():
        return "empty"
    if repeats(text):
        return "repetition"
    if not ended:
        return "trap"
    return "wrong" if parsed else "unparsable"
