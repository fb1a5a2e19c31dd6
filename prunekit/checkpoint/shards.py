"""Reads a folder of safetensors one tensor at a time, and believes nothing that its headers say."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from prunekit.errors import InputError
from prunekit.values import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NESTED = "nested.safetensors"
HEADER_BYTES = 100_000_000  # the format's own limit
CHUNK = 8 << 20  # bytes written and hashed at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as the format writes it, and its bytes' place."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            InputError: the file became shorter since its header was read.
        """
        return self.mapped().clone()

    def mapped(self) -> torch.Tensor:
        """The tensor as the file's own pages, which are read when they are looked at.

        Writing to it does not change the file. Fresh memory, page by page, may take several times
        as long as what is copied there.

        Raises:
            InputError: the file became shorter since its header was read.
        """
        if not self.size:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(self._bytes(), dtype=DTYPES[self.dtype]).reshape(self.shape)

    def sha256(self) -> str:
        """The hash of its bytes."""
        found = hashlib.sha256()
        for chunk in self.chunks():
            found.update(chunk)
        return found.hexdigest()

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, at most ``CHUNK`` at a time."""
        if self.size:
            whole = self._bytes()
            yield from (whole[i : i + CHUNK] for i in range(0, self.size, CHUNK))

    def _bytes(self) -> memoryview:
        with self.path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < self.start + self.size:
                raise InputError(f"{self.path}: {self.name} is cut short")
            before = self.start % mmap.ALLOCATIONGRANULARITY  # a map begins with a page
            options = {"access": mmap.ACCESS_COPY, "offset": self.start - before}
            pages = mmap.mmap(file.fileno(), before + self.size, **options)
        return memoryview(pages)[before:]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, and its own metadata.

    ``sha256`` is of its header, which says what its bytes mean.
    """

    path: Path
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    sha256: str


def read_shard(path: Path) -> Shard:
    """Read a file's header and hold it against the file.

    Raises:
        InputError: no such file, cut short, or a header that is no header of this file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(HEADER_BYTES, total - 8):
            raise InputError(f"{path}: is no whole safetensors file: its header is cut short")
        text = file.read(length)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", None) or {}
        found = [_entry(name, path, facts, 8 + length) for name, facts in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is no safetensors file: {type(error).__name__}") from None
    found.sort(key=lambda entry: entry.start)
    place = 8 + length
    for entry in found:
        if entry.start != place:
            raise InputError(
                f"{path}: is no safetensors file: {entry.name} overlaps or leaves a gap"
            )
        place += entry.size
    if place != total:
        raise InputError(f"{path}: has {total} bytes where its header says {place}; get it anew")
    return Shard(path, tuple(found), metadata, hashlib.sha256(text).hexdigest())


def _entry(name: str, path: Path, facts: dict, base: int) -> Entry:
    begin, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError
    if facts["dtype"] not in DTYPES:
        raise InputError(f"{path}: {name} is of dtype {facts['dtype']}, which is unknown here")
    size = prod(shape) * DTYPES[facts["dtype"]].itemsize
    if end - begin != size:
        raise InputError(f"{path}: {name} has {end - begin} bytes where its shape says {size}")
    return Entry(name, path, facts["dtype"], shape, base + begin, size)


def has_weights(folder: str | Path) -> bool:
    """Whether a folder has safetensors, or an index that says so."""
    return any((Path(folder) / name).is_file() for name in (INDEX, SINGLE))


class Shards:
    """The safetensors files of a model folder.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        InputError: there is neither, a shard is missing or broken, or the index lies.

    Cost:
        The headers are read, no tensor.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            self.shards = self._indexed(index)
        elif (self.folder / SINGLE).is_file():
            self.shards = [read_shard(self.folder / SINGLE)]
        else:
            raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        self.entries = {entry.name: entry for shard in self.shards for entry in shard.entries}

    def _indexed(self, index: Path) -> list[Shard]:
        try:
            said = parse_json(index.read_text())["weight_map"]
            names = sorted(set(said.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: is no index: {type(error).__name__}") from None
        for name in names:
            # Names come from whoever made the checkpoint: they stay inside it.
            if not isinstance(name, str) or Path(name).name != name or not name:
                raise InputError(f"{index}: names {name!r}, which is no file of this folder")
        shards = [read_shard(self.folder / name) for name in names]
        held = {entry.name: shard.path.name for shard in shards for entry in shard.entries}
        for name, file in sorted(said.items()):
            if held.get(name) != file:
                raise InputError(f"{index}: does not fit its shards: {name} is not in {file}")
        return shards

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    @property
    def sharded(self) -> bool:
        """Whether an index says which file holds what."""
        return (self.folder / INDEX).is_file()
