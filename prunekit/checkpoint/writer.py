"""Writes safetensors one tensor at a time, and hashes each as it goes by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch

from prunekit import files
from prunekit.checkpoint.shards import CHUNK, DTYPES, INDEX, SINGLE, Entry, Shards
from prunekit.errors import InputError


def write_shard(
    path: Path,
    planned: Sequence[tuple[str, str, tuple[int, ...]]],
    contents: Iterable[torch.Tensor | Entry],
    metadata: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write a file of tensors that need not be in memory together.

    Args:
        path: the file; written in place, so give it a temporary name or folder.
        planned: (name, dtype as the format writes it, shape) of each tensor, in order.
        contents: each tensor's value, or the place in another file that it is copied from; taken
            one after the other.
        metadata: of the file.

    Returns:
        sha256 of each tensor's bytes, by name.

    Raises:
        InputError: the disk is full, or a value is not what was planned.

    Cost:
        Each byte read and written once; hashing goes on beside it in a thread of its own.
    """
    hashes: dict[str, str] = {}
    try:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("wb", buffering=0))
            hasher = stack.enter_context(ThreadPoolExecutor(1))
            file.write(_header(planned, metadata))
            for (name, dtype, shape), content in zip(planned, contents, strict=True):
                size = prod(shape) * DTYPES[dtype].itemsize
                hashes[name] = _copy(file, _chunks(content), size, name, hasher)
    except OSError as error:
        raise InputError(f"{path.name}: cannot be written: {error.strerror}") from error
    return hashes


def write_index(folder: Path) -> None:
    """Say that a folder's weights lie in one file, unless an index says already where they lie.

    Some loaders take every safetensors file of a folder without an index for weights.
    """
    weights = Shards(folder)
    if not weights.sharded:
        total = sum(entry.size for entry in weights)
        where = {entry.name: SINGLE for entry in weights}
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _header(planned, metadata: dict[str, str] | None) -> bytes:
    facts: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name, dtype, shape in planned:
        size = prod(shape) * DTYPES[dtype].itemsize
        facts[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(facts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def _chunks(content: torch.Tensor | Entry) -> Iterator[memoryview]:
    if isinstance(content, torch.Tensor):
        if content.numel():
            flat = content.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            whole = memoryview(flat.numpy())
            yield from (whole[i : i + CHUNK] for i in range(0, len(whole), CHUNK))
        return
    yield from content.chunks()


def _copy(file, chunks: Iterator[memoryview], size: int, name: str, hasher) -> str:
    """Write the chunks; the one before is hashed meanwhile, and must be before its buffer is."""
    found, pending, written = hashlib.sha256(), None, 0
    for chunk in chunks:
        if pending is not None:
            pending.result()
        pending = hasher.submit(found.update, chunk)
        done = 0
        while done < len(chunk):
            done += file.write(chunk[done:])
        written += done
    if pending is not None:
        pending.result()
    if written != size:
        raise InputError(f"{name}: got {written} bytes, expected {size}")
    return found.hexdigest()
