"""Writing that leaves the old state or the new, never a half."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from prunekit.errors import InputError
from prunekit.tensors import DTYPES, NAMES, Entry, Shard, read_shard, write_shard
from prunekit.values import conform, parse_json

MODEL_MARKER = "config.json"  # what makes a folder one that --force may replace


def digest(value: Any) -> str:
    """Return a short sha256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_writable(path: Path) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written: {folder} is not a folder we may write to")


def check_output_file(path: str | Path) -> Path:
    """Return the path if a file may be written there: to be asked before long work.

    Raises:
        InputError: it is a folder, or its folder may not be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    _check_writable(path)
    return path


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it into place.

    What a process that was killed left behind is cleared away by the next that writes there.
    """
    path = check_output_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(path)
        prefix = f"{_remains(path)}{os.getpid()}-"
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_folder(path: str | Path, *, force: bool) -> Path:
    """Return the path if a folder may be written there: to be asked before long work.

    Raises:
        InputError: it is a file, a folder that is not empty and ``force`` is not set (or it is no
            model's folder, which ``force`` does not replace), or may not be written to.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(f"{path}: is a file; give a folder to write to")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise InputError(f"{path}: folder exists and is not empty; choose another or pass --force")
    if path.is_dir() and any(path.iterdir()) and not (path / MODEL_MARKER).is_file():
        raise InputError(f"{path}: --force replaces model folders alone, and this is none")
    _check_writable(path)
    return path


@contextmanager
def replacing_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success flush it and put it into place.

    What a process that was killed left behind is cleared away by the next that writes there.
    """
    path = check_output_folder(path, force=force)
    with working_folder(path) as temporary:
        yield temporary
        temporary.chmod(0o755)
        for item in temporary.rglob("*"):
            _flush(item)
        _put_into_place(temporary, path)
        _flush(path.parent)


@contextmanager
def working_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder beside ``path`` for what is needed on the way there; it goes afterwards.

    What a process that was killed left behind is cleared away by the next that writes there.
    """
    path = Path(path)
    _check_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(path)
        prefix = f"{_remains(path)}{os.getpid()}-"
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remains(path: Path) -> str:
    """How the names of this machine's temporaries for a path begin; a process id follows."""
    return f".{path.name}.{platform.node()}-"


def _clear_remains(path: Path) -> None:
    """Remove the temporary files and folders of processes that are no more."""
    start = _remains(path)
    for item in path.parent.iterdir():
        owner = item.name.removeprefix(start).partition("-")[0]
        if item.name.startswith(start) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)


def _put_into_place(new: Path, path: Path) -> None:
    """Rename a folder to where another may be; the other then has its name.

    Linux exchanges them in one step. Elsewhere there is a moment in which the path is not there.
    """
    if not path.exists():
        new.replace(path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(here, os.fsencode(new), here, os.fsencode(path), exchange) == 0:
            return
    old = new.with_name(new.name + ".old")
    path.replace(old)
    try:
        new.replace(path)
    except OSError:
        old.replace(path)
        raise
    old.replace(new)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON, or raise InputError with the reason."""
    try:
        return parse_json(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor | Entry], kind: str, header: dict[str, Any]
) -> None:
    """Write tensors, or copy them, and a JSON header that says what kind of file it is, as
    safetensors."""
    metadata = {"prunekit": json.dumps({"kind": kind, "version": 1, **header})}
    planned = [
        (name, value.dtype if isinstance(value, Entry) else NAMES[value.dtype], tuple(value.shape))
        for name, value in tensors.items()
    ]
    planned.sort(key=lambda each: -DTYPES[each[1]].itemsize)  # so that all lie aligned
    with replacing_file(path) as temporary:
        write_shard(temporary, planned, (tensors[name] for name, _, _ in planned), metadata)


def find_tensors(path: str | Path, kind: str) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Where in a file that `write_tensors` wrote its tensors lie, and its header.

    Raises:
        InputError: the file is missing, cut short, no safetensors, or of another kind or version.
    """
    shard = read_shard(Path(path))
    header = _header(shard)
    if header.get("kind") != kind or header.get("version") != 1:
        known = "kind" in header
        found = f"{header['kind']} version {header.get('version')}" if known else "no prunekit file"
        raise InputError(f"{path}: is {found}, expected {kind} version 1")
    return {entry.name: entry for entry in shard.entries}, header


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        InputError: as for `find_tensors`.
    """
    entries, header = find_tensors(path, kind)
    return {name: entry.read() for name, entry in entries.items()}, header


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the JSON header of a prunekit safetensors file; {} if it carries none."""
    return _header(read_shard(Path(path)))


def _header(shard: Shard) -> dict[str, Any]:
    try:
        header = parse_json(shard.metadata.get("prunekit", "{}"))
        conform(header, dict, "header")
        return header
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{shard.path}: is no whole safetensors file: {error}") from error
