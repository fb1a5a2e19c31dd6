"""Safetensors files one tensor at a time, believing nothing that their headers say."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from prunekit.errors import InputError
from prunekit.values import parse_json

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as the format writes it, and its bytes' place.

    ``stamp`` is when the file was last written, in ns, as its header was read.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    stamp: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            InputError: the file was written to since its header was read.
        """
        return self.mapped().clone()

    def mapped(self) -> torch.Tensor:
        """The tensor as the file's own pages, which are read when they are looked at.

        Writing to it does not change the file. Fresh memory, page by page, may take several times
        as long as what is copied there.

        Raises:
            InputError: the file was written to since its header was read.
        """
        if not self.size:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        pages = self._bytes(0, self.size)
        return torch.frombuffer(pages, dtype=DTYPES[self.dtype]).reshape(self.shape)

    def sha256(self) -> str:
        """The hash of its bytes."""
        found = hashlib.sha256()
        for chunk in self.chunks():
            found.update(chunk)
        return found.hexdigest()

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, at most ``CHUNK`` at a time; the file's pages go as they were used."""
        for begin in range(0, self.size, CHUNK):
            yield self._bytes(begin, min(CHUNK, self.size - begin))

    def _bytes(self, begin: int, size: int) -> memoryview:
        start = self.start + begin
        with self.path.open("rb", buffering=0) as file:
            now = os.fstat(file.fileno())
            if now.st_size < self.start + self.size or now.st_mtime_ns != self.stamp:
                raise InputError(f"{self.path}: was changed while {self.name} was to be read")
            before = start % mmap.ALLOCATIONGRANULARITY  # a map begins with a page
            options = {"access": mmap.ACCESS_COPY, "offset": start - before}
            pages = mmap.mmap(file.fileno(), before + size, **options)
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
        status = os.fstat(file.fileno())
        total, stamp = status.st_size, status.st_mtime_ns
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(HEADER_BYTES, total - 8):
            raise InputError(f"{path}: is no whole safetensors file: its header is cut short")
        text = file.read(length)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", None) or {}
        found = [_entry(name, path, facts, 8 + length, stamp) for name, facts in header.items()]
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
        raise InputError(
            f"{path}: is no whole safetensors file: has {total} bytes where its header says "
            f"{place}; get it anew"
        )
    return Shard(path, tuple(found), metadata, hashlib.sha256(text).hexdigest())


def _entry(name: str, path: Path, facts: dict, base: int, stamp: int) -> Entry:
    begin, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError
    if facts["dtype"] not in DTYPES:
        raise InputError(f"{path}: {name} is of dtype {facts['dtype']}, which is unknown here")
    size = prod(shape) * DTYPES[facts["dtype"]].itemsize
    if end - begin != size:
        raise InputError(f"{path}: {name} has {end - begin} bytes where its shape says {size}")
    return Entry(name, path, facts["dtype"], shape, base + begin, size, stamp)


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


class OnDisk:
    """A field that holds a tensor, the place in a file that it is read from whenever it is asked
    for, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: object | None, owner: type) -> torch.Tensor | None:
        held = None if instance is None else self.held(instance)
        return held.read() if isinstance(held, Entry) else held

    def __set__(self, instance: object, value: torch.Tensor | Entry | None) -> None:
        setattr(instance, self._name, value)

    def held(self, instance: object) -> torch.Tensor | Entry | None:
        """What is there, without reading it."""
        return getattr(instance, self._name)
