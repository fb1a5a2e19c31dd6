"""llama.cpp beside transformers in one benchmark: the same models, exported, in the same rounds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.gguf import save_gguf
from prunekit.errors import InputError

_FIRST = 100  # token id from which prompts count up: which tokens matters not for the time


def check_llamacpp() -> None:
    """Raise InputError where llama-cpp-python is not installed."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        why = "--llamacpp: needs llama-cpp-python: pip install llama-cpp-python"
        raise InputError(why) from None


@cache
def _silence() -> Callable:
    """Have llama.cpp say nothing from now on; it calls this function, which must not be freed."""
    import llama_cpp

    hears = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(hears, ctypes.c_void_p(0))
    return hears


class LlamaCpp:
    """Models in llama.cpp, on as many CPU threads as torch has.

    Args:
        models: each with its tokenizer, by name.
        folder: where their GGUF files are written; they have to stay while this is used.
        outtype: what their matrices are: f32, f16, bf16 or q8_0.
        length: the most tokens of a context.

    Raises:
        InputError: llama-cpp-python is not installed, or GGUF knows no such model.
    """

    label = "llama.cpp"

    def __init__(
        self,
        models: Mapping[str, tuple[nn.Module, Any]],
        folder: Path,
        outtype: str,
        length: int,
    ):
        check_llamacpp()
        import llama_cpp

        self.dtype, self._lib = outtype, llama_cpp
        _silence()
        self.files: dict[str, Path] = {}
        self.engines: dict[str, Any] = {}
        threads = torch.get_num_threads()
        options = {"n_ctx": length, "n_batch": length, "n_ubatch": min(length, 512)}
        options |= {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
        options["flash_attn"] = True  # llama.cpp's own tools choose it by themselves
        for number, (name, (model, tokenizer)) in enumerate(models.items()):
            path = self.files[name] = folder / f"{number}.gguf"
            save_gguf(model, tokenizer, path, outtype)
            self.engines[name] = llama_cpp.Llama(str(path), **options)

    def cases(
        self, prompt: int, generate: int, batch: Sequence[int]
    ) -> dict[tuple[str, str, int], tuple[Callable[[], None], int]]:
        """What `prunekit.measure.comparison.cases_of` gives, for batches of one sequence."""
        if 1 not in batch:
            return {}
        cases = {}
        for name in self.engines:
            cases[name, f"pp{prompt}", 1] = self.prefill(name, prompt), prompt
        for name in self.engines:
            cases[name, f"tg{generate}", 1] = self.decode(name, prompt, generate), generate
        return cases

    def prefill(self, name: str, prompt: int) -> Callable[[], None]:
        """A function that reads a prompt of so many tokens."""
        engine = self.engines[name]

        def run() -> None:
            engine.reset()
            engine.eval(range(_FIRST, _FIRST + prompt))

        return run

    def decode(self, name: str, prompt: int, generate: int) -> Callable[[], None]:
        """A function that decodes so many tokens, as llama-bench does, after a prompt."""
        engine, lib = self.engines[name], self._lib
        token = (lib.llama_token * 1)()

        def run() -> None:
            memory = lib.llama_get_memory(engine.ctx)
            if lib.llama_memory_seq_pos_max(memory, 0) < prompt - 1:
                self.prefill(name, prompt)()
            lib.llama_memory_seq_rm(memory, 0, prompt, -1)  # what was decoded before
            for token[0] in range(_FIRST, _FIRST + generate):
                if lib.llama_decode(engine.ctx, lib.llama_batch_get_one(token, 1)):
                    raise RuntimeError("llama_decode failed")
            lib.llama_synchronize(engine.ctx)

        return run
