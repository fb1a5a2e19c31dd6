"""The project's own cases: every operation at one real shape, and the main job on a real model.

Run under any revision of prunekit, so they use what users call and nothing private.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunekit import ops

Case = Callable[[], object]
HIDDEN, WIDTH, LAYERS = 576, 1024, 30  # SmolLM2-135M with a third of its neurons removed


def operations() -> dict[str, Case]:
    """A call or a layer's round of each operation, by name; on the CPU, bf16 where it can be."""
    torch.manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / 16).bfloat16()

    def through(tokens: int) -> Case:
        x, layers = matrix(tokens, HIDDEN), mlps if tokens < 16 else mlps[:1]

        @torch.inference_mode()
        def run() -> None:
            for gate, up, down in layers:
                ops.gated_mlp(x, gate, up, down)

        return run

    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    mlps = [tuple(matrix(*shape) for shape in shapes) for _ in range(LAYERS)]
    rows, columns = matrix(8960, 1536), matrix(1536, 8960)
    half = torch.randperm(8960)[:4480].sort().values
    gate, up = matrix(2048, WIDTH), matrix(2048, WIDTH)
    spans = torch.tensor([[i * 256, i * 256 + 200] for i in range(8)])
    gram, h = torch.zeros(WIDTH, WIDTH), matrix(1024, WIDTH)
    return {
        "gated_mlp, 1 token, 30 layers": through(1),
        "gated_mlp, 8 tokens, 30 layers": through(8),
        "gated_mlp, 256 tokens": through(256),
        "gated_act_stats [2048, 1024]": lambda: ops.gated_act_stats(gate, up, spans, "silu"),
        "gram_update [1024, 1024]": lambda: ops.gram_update(gram, h),
        "gather_rows [8960, 1536]": lambda: ops.gather_rows(rows, half),
        "gather_cols [1536, 8960]": lambda: ops.gather_cols(columns, half),
        "compact_mlp [8960, 1536]": lambda: ops.compact_mlp(rows, rows, columns, half),
    }


def main_job() -> dict[str, Case]:
    """Calibration, and prefill and decoding with drop-in MLPs, of the embedded model."""
    from prunekit.calibrate import calibrate
    from prunekit.compact import compact_modules
    from prunekit.corpus import Corpus
    from prunekit.integrations.loading import load, load_tokenizer
    from prunekit.measure.throughput import decode_case, prefill_case
    from prunekit.tasks.embedded import humaneval

    model, tokenizer = load("demo"), load_tokenizer("demo")
    few = Corpus("HumanEval", humaneval()[0].examples[:4])
    served = compact_modules(load("demo"))
    return {
        "calibrate with Gram, 4 prompts": lambda: calibrate(
            model, tokenizer, few, gram=True, quiet=True
        ),
        "prefill of 128": prefill_case(served, 1, 128),
        "decode of 16": decode_case(served, 1, 128, 16),
    }


SUITES = {"operations": operations, "main": main_job}
