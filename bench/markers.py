"""Generated text in documents that people write: it stands between two markers, and only there."""

from __future__ import annotations

from pathlib import Path

from prunekit.errors import InputError
from prunekit.files import replacing_file


def between(document: str, name: str, text: str) -> str:
    """A document with this text between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        InputError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = document.partition(begin)
    inside, closed, after = rest.partition(end)
    if not found or not closed or begin in inside + after or end in after:
        raise InputError(f"expected {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{text.rstrip()}\n{end}{after}"


def rewrite(path: Path, name: str, text: str) -> None:
    """Put the text between a file's markers.

    Raises:
        InputError: as `between`, naming the file; it is then as it was.
    """
    try:
        document = between(path.read_text(), name, text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    with replacing_file(path) as temporary:
        temporary.write_text(document)
