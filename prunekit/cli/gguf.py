"""GGUF on the command line: `prunekit export --format gguf`, and `prunekit inspect` of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.arch import find_mlps
from prunekit.checkpoint import RECORD, read_record
from prunekit.checkpoint.gguf import check_output_gguf, save_gguf
from prunekit.checkpoint.gguf_layout import layout_of
from prunekit.checkpoint.gguf_read import read_gguf
from prunekit.checkpoint.shards import Shards
from prunekit.cli.output import Output, count, megabytes
from prunekit.config import ExportConfig
from prunekit.integrations.loading import load, load_shape, load_tokenizer
from prunekit.integrations.nested import is_nested

_FOLDER_ONLY = ("sha256", "bytes")  # of a record: what is true of the folder's own files


def export_gguf(config: ExportConfig, output: Output) -> int:
    """Check, write the file, and say what was written."""
    check_output_gguf(config.output, force=config.force)
    layout_of(load_shape(config.model))  # before weights are fetched or read
    tokenizer = load_tokenizer(config.model)
    model, read = _weights(config)
    record = _record(config.model)
    path = save_gguf(
        model,
        tokenizer,
        config.output,
        config.outtype,
        read=read,
        name=Path(record.get("model") or model.config._name_or_path or config.model).name,
        record=record,
        force=config.force,
        quiet=config.quiet,
    )
    widths = [view.width for view in find_mlps(model, verify=False)]
    file = read_gguf(path)
    if (window := file.get("context_length")) < model.config.max_position_embeddings:
        output.note(
            f"the model's attention looks back {window} tokens, llama.cpp's over all: the file "
            f"says a context of {window}, in which they are the same"
        )
    facts = {
        "output": str(path),
        "architecture": file.architecture,
        "widths": widths,
        "values": file.types,
        "bytes": path.stat().st_size,
    }
    span = f"{min(widths)} to {max(widths)}" if len(set(widths)) > 1 else f"{widths[0]}"
    output.line(
        f"{file.architecture}: {len(widths)} MLPs of {span} neurons, {' and '.join(file.types)}, "
        f"{megabytes(facts['bytes'])} on disk\n"
        f"saved {path}: runs in llama.cpp, `llama-cli -m {path}`"
    )
    output.json(facts)
    return 0


def _weights(
    config: ExportConfig,
) -> tuple[nn.Module, Callable[[str], torch.Tensor] | None]:
    """The model, and None; or, where its tensors lie in a folder by its own names, the model
    without weights, and a function that reads one.
    """
    folder = Path(config.model)
    if config.dtype == "auto" and folder.is_dir() and not is_nested(folder):
        shape, entries = load_shape(config.model), Shards(folder).entries
        tied = set(getattr(shape, "all_tied_weights_keys", None) or ())
        expected = {k: tuple(v.shape) for k, v in shape.state_dict().items() if k not in tied}
        if all(k in entries and entries[k].shape == v for k, v in expected.items()):
            return shape, lambda name: entries[name].mapped()
    return load(config.model, dtype=config.dtype), None


def _record(model: str) -> dict[str, Any]:
    """What prunekit recorded of a model's pruning; {} where it recorded nothing."""
    path = Path(model)
    if path.suffix == ".gguf":
        return read_gguf(path).record
    if not (path / RECORD).is_file():
        return {}
    return {k: v for k, v in read_record(path).items() if k not in _FOLDER_ONLY}


def inspect_gguf(path: Path, output: Output) -> int:
    """Describe a GGUF file."""
    file = read_gguf(path)
    widths, record, keys = file.widths, file.record, file.keys
    tokens = len(keys.get("tokenizer.ggml.tokens", []))
    rows = [
        ("architecture", file.architecture),
        ("name", keys.get("general.name", "")),
        ("parameters", count(sum(file.types.values()))),
        ("values", ", ".join(f"{count(n)} {kind}" for kind, n in file.types.items())),
        ("size on disk", megabytes(path.stat().st_size)),
        ("layers, hidden size", f"{file.get('block_count')}, {file.get('embedding_length')}"),
        ("MLP widths", _runs(widths)),
        ("context", f"{file.get('context_length')} tokens"),
        ("tokenizer", f"{keys.get('tokenizer.ggml.model')}, {keys.get('tokenizer.ggml.pre')}"),
        ("tokens", f"{tokens}"),
        ("chat template", "yes" if "tokenizer.chat_template" in keys else "no"),
    ]
    if "dense_widths" in record:
        rows.append(("dense widths", _runs(record["dense_widths"])))
        rows.append(("sparsity reached", f"{record['sparsity']:.4f}"))
        recipe = {k: v for k, v in record["recipe"].items() if v and k != "fingerprint"}
        rows += [(k.replace("_", " "), str(v)) for k, v in recipe.items()]
    output.table(f"GGUF file {path}", ("", "value"), rows)
    output.json(
        {
            "kind": "gguf",
            "architecture": file.architecture,
            "values": file.types,
            "widths": widths,
            "bytes": path.stat().st_size,
            "record": record,
        }
    )
    return 0


def _runs(widths: list[int]) -> str:
    return f"{widths[0]}" if len(set(widths)) == 1 else ", ".join(map(str, widths))
