"""vLLM in a process of its own, for benchmarks and tests.

Apart from transformers, whose classes vLLM's transformers backend changes, and from other models.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
DOWN = (".down_proj", ".mlp.c_proj", ".fc2", ".dense_4h_to_h")  # what a down projection is called


class VLLM:
    """A process that loads one model after the other and continues prompts with it.

    Args:
        environment: variables of that process, beside ``ENVIRONMENT``.

    Raises:
        RuntimeError: by every method, with the traceback of what failed there.
    """

    def __init__(self, environment: Mapping[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, ENVIRONMENT | dict(environment or {}))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that a process that died is an EOFError here

    def load(self, folder: str, **options: Any) -> None:
        """Load a model in place of the one before; options are those of ``vllm.LLM``."""
        self._ask("load", folder, {"enforce_eager": True, "max_model_len": 128} | options)

    def continues(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """So many token ids greedily after each prompt's, all prompts in one batch."""
        return self._ask("continues", prompts, tokens)

    def widths(self) -> list[int]:
        """The MLPs' widths, in order, as vLLM built them."""
        return self._ask("widths")

    def silu_and_mul(self, gate_and_up: Any) -> Any:
        """What vLLM's own kernel makes of [T, 2·F], gate beside up: [T, F]."""
        return self._ask("silu_and_mul", gate_and_up)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        failed, answer = self._pipe.recv()
        if failed:
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    model = _Model()
    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = False, getattr(model, what)(*arguments)
        except Exception:
            answer = True, traceback.format_exc()
        pipe.send(answer)


class _Model:
    def __init__(self):
        self.llm = None

    def load(self, folder: str, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
        cleanup_dist_env_and_memory()  # of one that failed, too
        self.llm = LLM(folder, **options)

    def continues(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(asked, how, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def widths(self) -> list[int]:
        return self.llm.apply_model(_widths)[0]

    def silu_and_mul(self, gate_and_up: Any) -> Any:
        import torch
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        out = gate_and_up.new_empty((len(gate_and_up), gate_and_up.shape[1] // 2))
        torch.ops._C.silu_and_mul(out, gate_and_up)
        return out


def _widths(model: Any) -> list[int]:
    return [module.input_size for name, module in model.named_modules() if name.endswith(DOWN)]
