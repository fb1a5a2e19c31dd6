"""The readers, each fed from bytes: they read, or say in one line why not, and do nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import prunekit as pk
from prunekit.checkpoint.gguf import save_gguf
from prunekit.checkpoint.nested import save_nested
from prunekit.cli import inspect
from prunekit.cli.output import Output
from prunekit.config import InspectConfig
from prunekit.corpus import read_corpus
from prunekit.errors import InputError
from tests.models import tiny_model
from tests.vocabularies import byte_level

WORDS = 400  # of the vocabulary


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        name: what the file is called, in a folder of its own.
        read: reads that file, or its folder; an InputError is an answer.
        seed: a file that is whole.
    """

    name: str
    read: Callable[[Path], object]
    seed: Callable[[], bytes]

    def __call__(self, data: bytes) -> bool:
        """Whether the bytes could be read; anything but a refusal is raised."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            path.write_bytes(data)
            try:
                self.read(path)
            except InputError as error:
                refusal = str(error)
            else:
                return True
        assert refusal.count("\n") == 0, f"more than one line: {refusal}"
        return False


def _inspect(path: Path) -> None:
    """As `prunekit inspect` does, what it prints included."""
    with contextlib.redirect_stdout(io.StringIO()):
        inspect.run(InspectConfig(str(path)), Output(as_json=False))


def _corpus(path: Path) -> None:
    read_corpus(path)


@cache
def _written() -> dict[str, bytes]:
    """A small file of each kind, as prunekit writes it."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        folder, words = Path(place), byte_level("qwen2", WORDS)
        model = tiny_model("llama", vocab_size=WORDS)
        stats = pk.calibrate(model, words, ["a few words", "and more"], gram=True, quiet=True)
        stats.save(folder / "stats")
        plan = pk.plan(pk.score(stats, model), 0.5, multiple_of=8)
        plan.save(folder / "plan")
        anchored = {"stats": stats, "anchors": (0.5,), "compensate": "lstsq", "multiple_of": 8}
        save_nested(model, words, folder / "nested", pk.score(stats, model), **anchored)
        small = pk.prune(model, plan, stats=stats, compensate="lstsq")
        pk.save(small, words, folder / "small")
        save_gguf(small, words, folder / "m.gguf", "f16")
        return {
            "stats": (folder / "stats").read_bytes(),
            "plan": (folder / "plan").read_bytes(),
            "record": (folder / "small" / "prunekit.json").read_bytes(),
            "nested": (folder / "nested" / "nested.safetensors").read_bytes(),
            "gguf": (folder / "m.gguf").read_bytes(),
        }


_JSONL = b'{"text": "one"}\n{"prompt": "two", "completion": "three"}\n'
READERS = {
    "stats": Reader("task.stats", _inspect, lambda: _written()["stats"]),
    "plan": Reader("plan.safetensors", _inspect, lambda: _written()["plan"]),
    "record": Reader("prunekit.json", lambda p: _inspect(p.parent), lambda: _written()["record"]),
    "nested": Reader(
        "nested.safetensors", lambda p: _inspect(p.parent), lambda: _written()["nested"]
    ),
    "gguf": Reader("model.gguf", _inspect, lambda: _written()["gguf"]),
    "jsonl": Reader("task.jsonl", _corpus, lambda: _JSONL),
    "csv": Reader("task.csv", _corpus, lambda: b"prompt,completion\none,two\n"),
}


def header_of(data: bytes) -> dict:
    """prunekit's own header in a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["prunekit"])


def with_header(data: bytes, header: object) -> bytes:
    """The same tensors under another header of prunekit's, which is text or a value for JSON."""
    length = struct.unpack("<Q", data[:8])[0]
    whole = json.loads(data[8 : 8 + length])
    text = header if isinstance(header, str) else json.dumps(header)
    whole["__metadata__"]["prunekit"] = text
    head = json.dumps(whole).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + length :]
