"""Reads a GGUF file: its header at once, its tensors one at a time; believes nothing of it."""

from __future__ import annotations

import functools
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from prunekit.errors import InputError
from prunekit.values import conform, parse_json

MAGIC = b"GGUF"
# By the number that stands for it: the types of single values. 8 is a string, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 1 << 20  # the largest that is believed


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its type by ggml's number, its shape as in torch, its bytes' place."""

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GGUF:
    """A GGUF file, opened: its header was read, its tensors were not.

    Attributes:
        path: the file.
        keys: its metadata.
        tensors: by their names.
    """

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.keys["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the architecture, such as ``block_count``."""
        return self.keys.get(f"{self.architecture}.{key}", default)

    @property
    def types(self) -> dict[str, int]:
        """The number of values of each type: f32, f16, q8_0 and so on."""
        found: Counter[str] = Counter()
        for tensor in self.tensors.values():
            found[GGMLQuantizationType(tensor.kind).name.lower()] += prod(tensor.shape)
        return dict(found.most_common())

    @property
    def widths(self) -> list[int]:
        """Each layer's MLP width; [] where the file says none."""
        said, count = self.get("feed_forward_length", []), self.get("block_count", 0)
        try:
            conform(said, (int, [int]))
            conform(count, int)
        except ValueError:
            raise InputError(f"{self.path}: its feed_forward_length is no width") from None
        if isinstance(said, list):
            return said
        return [said] * min(max(count, 0), len(self.tensors))

    @property
    def record(self) -> dict[str, Any]:
        """What prunekit wrote of the model's pruning; {} if it did not write the file."""
        try:
            said = parse_json(self.keys.get("prunekit.record", "{}"))
            conform(said, dict)
            if "dense_widths" in said:
                conform(said, {"dense_widths": [int], "sparsity": float, "recipe": dict})
        except (ValueError, TypeError):
            raise InputError(f"{self.path}: its prunekit.record is no record") from None
        return said

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values, fp32, dequantised.

        Raises:
            InputError: the file became shorter since its header was read, or the type is one that
                the package gguf does not dequantise.
        """
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            raw = np.frombuffer(file.read(tensor.size), np.uint8)
        if raw.size != tensor.size:
            raise InputError(f"{self.path}: {name} is cut short")
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            values = dequantize(rows, GGMLQuantizationType(tensor.kind))
        except NotImplementedError as error:
            raise InputError(f"{self.path}: {name}: {error}") from None
        return torch.from_numpy(np.array(values, np.float32).reshape(tensor.shape))


def read_gguf(path: str | Path) -> GGUF:
    """Read a file's header and hold it against the file; once for each state of the file.

    Raises:
        InputError: no such file, cut short, or none of GGUF's versions 2 and 3, little-endian.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    facts = path.stat()
    return _read(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, total: int, changed: int) -> GGUF:
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise InputError(f"{path}: is no GGUF file")
        try:
            return _parse(path, file, total)
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError):
            raise InputError(f"{path}: is no whole GGUF file: its header is cut short") from None


def _parse(path: Path, file: BinaryIO, total: int) -> GGUF:
    reader = _Reader(file, total)
    version = reader.scalar("I")
    if version not in (2, 3):
        raise InputError(f"{path}: is GGUF version {version}; expected 2 or 3, little-endian")
    tensor_count, key_count = reader.scalar("Q"), reader.scalar("Q")
    keys = {}
    for _ in range(key_count):
        name = reader.string()
        keys[name] = reader.value(reader.scalar("I"))
    if not isinstance(keys.get("general.architecture"), str):
        raise InputError(f"{path}: names no architecture")
    if not isinstance(keys.get("tokenizer.ggml.tokens", []), list):
        raise InputError(f"{path}: its tokens are no list")
    found = []
    for _ in range(tensor_count):
        name = reader.string()
        shape = tuple(reversed([reader.scalar("Q") for _ in range(reader.scalar("I"))]))
        found.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _ALIGNMENT:
        raise InputError(f"{path}: is aligned to {alignment!r}; expected a number of bytes")
    base = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        if kind not in (t.value for t in GGMLQuantizationType):
            raise InputError(f"{path}: {name} is of type {kind}, which is unknown here")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block:
            raise InputError(f"{path}: {name} is {list(shape)}, which its type does not divide")
        tensors[name] = Tensor(name, kind, shape, base + offset, prod(shape) // block * size)
        end = tensors[name].start + tensors[name].size
        if end > total:
            raise InputError(f"{path}: has {total} bytes where {name} ends at {end}; get it anew")
    return GGUF(path, keys, tensors)


class _Reader:
    """Values one after the other; none is larger than what is left of the file."""

    def __init__(self, file: BinaryIO, total: int):
        self.file, self.total = file, total

    def take(self, size: int) -> bytes:
        if size > self.total - self.file.tell():
            raise struct.error
        return self.file.read(size)

    def scalar(self, kind: str) -> Any:
        size = struct.calcsize("<" + kind)
        return struct.unpack("<" + kind, self.file.read(size))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        # A string takes 8 bytes or more; an array of arrays of arrays is nobody's.
        if count * 8 > self.total - self.file.tell() or depth > 1:
            raise struct.error
        return [self.value(inner, depth + 1) for _ in range(count)]
