"""A run's results on disk: one JSON line a cell, added one by one, that outlive a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prunekit.errors import InputError
from prunekit.values import parse_json

NAME = "results.jsonl"


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ledger; a last line that a kill has cut short is left out.

    Raises:
        InputError: it cannot be read, or a line before the last is no JSON object.
    """
    return _whole(Path(path))[0]


class Ledger:
    """Rows of results, each of which is on disk before `append` returns.

    Args:
        folder: of the run; made if it is not there. A second process is refused while this one
            writes.

    Raises:
        InputError: the folder cannot be written to, is being written to, or its rows are broken.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        _lock(self._file, path)
        self.rows, whole = _whole(path)
        self._file.truncate(whole)  # a torn line would otherwise be the beginning of the next

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, and wait until it is on disk."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{path}: another process writes to it; wait for it") from None


def _whole(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the bytes that they take."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    lines = content.split(b"\n")
    torn = bool(lines.pop())  # what follows the last newline: nothing, or half a row
    rows: list[dict[str, Any]] = []
    end = 0
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError as error:
            if number == len(lines) and not torn:  # its blocks were not yet all on disk
                break
            raise InputError(f"{path}:{number}: is no row of results: {error}") from None
        rows.append(row)
        end += len(line) + 1
    return rows, end
