"""A JSONL file of generations that a killed run leaves behind and the next one goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from prunekit.errors import InputError
from prunekit.files import check_output_file
from prunekit.tasks.base import Generation
from prunekit.values import parse_json


class Journal:
    """Generations by problem, one JSON object a line below a header that says what they are of.

    Args:
        path: the file; made if there is none.
        header: what must be the same for its generations to count: model, task, limit.

    Raises:
        InputError: the file is of something else, or is no such file, or cannot be written.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]):
        self.path = check_output_file(path)
        self.done: dict[str, Generation] = {}
        whole = self._whole_lines()
        if whole:
            self._read(whole, header)
        with self._writing("r+b" if self.path.exists() else "wb") as file:
            file.truncate(len(whole))  # a line that a kill cut short goes
        if not whole:
            self._append([header])

    def add(self, generations: Sequence[Generation]) -> None:
        """Append generations, and wait until they are on disk."""
        self._append([asdict(generation) for generation in generations])
        self.done |= {generation.id: generation for generation in generations}

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        with self._writing("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    @contextmanager
    def _writing(self, mode: str) -> Iterator[BinaryIO]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _whole_lines(self) -> bytes:
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def _read(self, whole: bytes, header: dict[str, Any]) -> None:
        try:
            found, *rows = [parse_json(line) for line in whole.splitlines()]
            kept = [Generation(**row) for row in rows]
        except (ValueError, TypeError):
            raise InputError(
                f"{self.path}: is no file of generations; give another, or a new one"
            ) from None
        differing = sorted(key for key in header if found.get(key) != header[key])
        if differing:
            raise InputError(
                f"{self.path}: has generations of another {' and '.join(differing)}; give another "
                "file, or a new one"
            )
        self.done = {generation.id: generation for generation in kept}
