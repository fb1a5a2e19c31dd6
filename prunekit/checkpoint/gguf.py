"""Writes a model as one GGUF file, which llama.cpp runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from prunekit import files
from prunekit.arch import all_finite, text_config
from prunekit.checkpoint.gguf_layout import (
    add_metadata,
    arranged,
    frequency_factors,
    head_counts,
    head_size,
    layout_of,
    names,
    rope_of,
)
from prunekit.checkpoint.gguf_vocab import vocabulary
from prunekit.errors import InputError
from prunekit.progress import progress_bar

RECORD_KEY = "prunekit.record"
_F32, _F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
_BF16, _Q8_0 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.Q8_0
OUTTYPES = {"f32": _F32, "f16": _F16, "bf16": _BF16, "q8_0": _Q8_0}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def outtype_of(dtype: torch.dtype) -> str:
    """What ``auto`` stands for: as in llama.cpp never more than 16 bits."""
    return "f16" if dtype == torch.float16 else "bf16"


def check_output_gguf(path: str | Path, *, force: bool) -> Path:
    """Return the path if a GGUF file may be written there: to be asked before long work.

    Raises:
        InputError: its name does not end in .gguf, it exists and ``force`` is not set, or its
            folder may not be written to.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise InputError(f"{path}: got a name that does not end in .gguf, by which GGUF is known")
    files.check_output_file(path)
    if path.exists() and not force:
        raise InputError(f"{path}: exists; choose another name or pass --force")
    return path


def save_gguf(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    outtype: str = "auto",
    *,
    read: Callable[[str], torch.Tensor] | None = None,
    name: str = "",
    record: dict[str, Any] | None = None,
    force: bool = False,
    quiet: bool = True,
) -> Path:
    """Write a model, its tokenizer and its chat template as one GGUF file; it appears whole.

    Matrices are of the type asked for, norms and biases f32. A matrix whose rows do not divide
    into blocks of 32 is f16 where q8_0 was asked for, as in llama.cpp.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3, dense or pruned. MLPs that differ in width by
            layer become llama.cpp's architecture deci (not Qwen3).
        tokenizer: a fast one of transformers.
        path: the file to write; ends in .gguf.
        outtype: f32, f16, bf16, q8_0, or auto (f16 for fp16 models, else bf16).
        read: gives a tensor by its name, where the model is without weights.
        name: what the file calls the model.
        record: further facts of it, kept as JSON under the key ``prunekit.record``.
        force: replace a file that exists.
        quiet: no progress bar.

    Raises:
        InputError: the model or its tokenizer is none that llama.cpp computes alike, a weight is
            not finite or beyond f16, or the file cannot be written; nothing is written then.

    Cost:
        The weights read and the file written once; one tensor and its fp32 copy in memory.

    Source:
        The format: ggml's docs/gguf.md; names and keys as llama.cpp reads them.
    """
    check_output_gguf(path, force=force)
    if outtype == "auto":
        outtype = outtype_of(next(p.dtype for p in model.parameters()))
    if outtype not in OUTTYPES:
        raise InputError(f"outtype: got {outtype}; expected auto, {', '.join(OUTTYPES)}")
    layout, config, state = layout_of(model), text_config(model), model.state_dict()
    planned = [
        (source, target, _type(target, state[source].shape, outtype))
        for source, target in names(model, layout)
    ]
    vocab = vocabulary(tokenizer, config.vocab_size)
    factors = frequency_factors(rope_of(config), head_size(config))
    with files.replacing_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, layout.architecture)
        try:
            writer.add_type("model")
            writer.add_name(name or Path(getattr(config, "_name_or_path", "")).name)
            add_metadata(writer, model)
            writer.add_file_type(_FILE_TYPES[outtype])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            vocab.write(writer)
            if record:
                writer.add_string(RECORD_KEY, json.dumps(record))
            if factors is not None:
                _plan(writer, "rope_freqs.weight", factors.shape, _F32)
            for source, target, kind in planned:
                _plan(writer, target, state[source].shape, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            with progress_bar(len(planned), "gguf", "tensor", quiet=quiet) as bar:
                for source, _, kind in planned:
                    value = (read or state.__getitem__)(source)
                    value = arranged(source, value, layout, head_counts(model))
                    writer.write_tensor_data(encoded(source, value, kind))
                    bar.update()
            writer.flush()
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            writer.close()
    return Path(path)


def _type(name: str, shape: torch.Size, outtype: str) -> gguf.GGMLQuantizationType:
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return _F32  # llama.cpp has no others for these
    kind = OUTTYPES[outtype]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else _F16


def _plan(writer: gguf.GGUFWriter, name: str, shape: torch.Size, kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = shape.numel() // block * size
    writer.add_tensor_info(name, list(shape), np.dtype(np.float32), count, raw_dtype=kind)


def encoded(name: str, tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A tensor's bytes as a GGUF type has them.

    Raises:
        InputError: it is not finite, or beyond f16 (or q8_0, whose scales are f16).
    """
    tensor = tensor.detach().cpu().contiguous()
    if not all_finite(tensor):
        raise InputError(f"GGUF: {name} holds NaN or Inf; get the model anew")
    if kind == _BF16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    values = tensor.float()
    most = {_F16: 65504.0, _Q8_0: 65504.0 * 127}.get(kind)
    if most is not None and values.numel() and values.abs().max() > most:
        found = f"{values.abs().max():.3g}, beyond what {kind.name.lower()} can say"
        raise InputError(f"GGUF: {name} holds {found}; pass --outtype bf16")
    return gguf.quants.quantize(values.numpy(), kind)
