"""Corpora: files of prompts, as text and, where they say so, the completion to be scored."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import InputError
from prunekit.values import parse_json

_COLUMNS = "`text`, `prompt` (with or without `completion`), or `messages`"


@dataclass(frozen=True)
class Example:
    """One prompt: the whole text, and where in it (in characters) the completion begins."""

    text: str
    completion_start: int = 0


@dataclass(frozen=True)
class Corpus:
    """Examples with the name and the hash that provenance records."""

    name: str
    examples: tuple[Example, ...]

    @property
    def hash(self) -> str:
        """sha256 of the texts in order, 16 hex digits."""
        h = hashlib.sha256()
        for example in self.examples:
            h.update(f"{example.completion_start}:{example.text}\0".encode())
        return h.hexdigest()[:16]


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected an object, got {type(row).__name__}")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            yield reader.line_num, row


def _dataset_rows(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"hf:{name}: needs the package datasets; pip install 'prunekit[hub]'"
        ) from None
    path, _, split = name.partition(":")
    owner, *rest = path.split("/")
    path, config = "/".join([owner, *rest[:1]]), rest[1] if rest[1:] else None
    yield from enumerate(datasets.load_dataset(path, config, split=split or "train"), 1)


def read_rows(source: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSONL or CSV file, or of ``hf:NAME[:split]``, with their numbers.

    Raises:
        InputError: no such file, or a line that is no JSON or no CSV (with its number).
    """
    name = str(source)
    path = Path(name)
    if name.startswith("hf:"):
        rows = _dataset_rows(name[3:])
    elif not path.is_file():
        raise InputError(f"{name}: {'is a folder' if path.is_dir() else 'no such file'}")
    elif path.suffix == ".csv":
        rows = _csv_rows(path)
    else:
        rows = _jsonl_rows(path)
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text: {error}") from None
    except csv.Error as error:
        raise InputError(f"{name}: is no CSV: {error}") from None


def _example(row: dict[str, Any], where: str, tokenizer: Any) -> Example:
    if isinstance(row.get("text"), str):
        return Example(row["text"])
    if isinstance(row.get("prompt"), str):
        prompt, completion = row["prompt"], row.get("completion") or ""
        if not isinstance(completion, str):
            raise InputError(f"{where}: completion must be a string")
        return Example(prompt + completion, len(prompt) if completion else 0)
    if isinstance(row.get("messages"), list):
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError(f"{where}: `messages` need a tokenizer with a chat template")
        head, whole = row["messages"][:-1], row["messages"]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        opened = (
            tokenizer.apply_chat_template(head, tokenize=False, add_generation_prompt=True)
            if head
            else ""
        )
        return Example(text, len(opened) if text.startswith(opened) else 0)
    raise InputError(
        f"{where}: no usable column; have {', '.join(map(str, row)) or 'none'}; expected {_COLUMNS}"
    )


def _renamed(row: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise InputError(f"{where}: no column {missing[0]}; have {', '.join(map(str, row))}")
    return {ours: row[theirs] for ours, theirs in columns.items()}


def read_corpus(
    source: str | Path,
    tokenizer: Any = None,
    *,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Corpus:
    """Read a JSONL or CSV file, or ``hf:NAME[:split]``, NAME being owner/dataset[/configuration].

    Args:
        source: rows with ``text``, ``prompt`` (+ ``completion``), or ``messages``.
        tokenizer: applies its chat template to ``messages``; not needed otherwise.
        limit: read at most so many rows.
        columns: what ``text``, ``prompt``, ``completion`` or ``messages`` are called there; of a
            row, only these are then read.

    Raises:
        InputError: no such file, a line that is no JSON (with its number), no usable column, or no
            row at all.
    """
    name = str(source)
    examples = []
    for number, row in read_rows(name):
        if limit is not None and len(examples) >= limit:
            break
        if columns:
            row = _renamed(row, columns, f"{name}:{number}")
        example = _example(row, f"{name}:{number}", tokenizer)
        if example.text:
            examples.append(example)
    if not examples:
        raise InputError(f"{name}: the corpus is empty")
    return Corpus(name, tuple(examples))


def as_corpus(source: str | Path | Corpus | Sequence[str], tokenizer: Any = None) -> Corpus:
    """Accept what callers have: a path, a list of texts, or a Corpus."""
    if isinstance(source, Corpus):
        return source
    if isinstance(source, str | Path):
        return read_corpus(source, tokenizer)
    return from_texts(source)


def from_texts(texts: Iterable[str], name: str = "texts") -> Corpus:
    """A corpus of plain texts.

    Raises:
        InputError: there is none.
    """
    examples = tuple(Example(text) for text in texts if text)
    if not examples:
        raise InputError(f"{name}: the corpus is empty")
    return Corpus(name, examples)
