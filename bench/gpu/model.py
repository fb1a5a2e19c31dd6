"""python -m bench.gpu.model: whole models, dense and pruned, prefill and decode on a GPU.

Speed depends on shapes, not on values, so the weights are random and nothing is downloaded. A
decode step is one CUDA graph, so that no launch from the host hides what the kernels take.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache

from bench.gpu.environment import environment
from bench.gpu.results import MEASURED, REHEARSED, SCHEMA, safe_name
from bench.gpu.speed import race
from bench.gpu.timer import timer_for
from prunekit.arch import cache_keyword
from prunekit.compact import compact_modules
from prunekit.experiment.twin import twin
from prunekit.files import write_json
from prunekit.measure.memory import parameter_count
from prunekit.measure.provenance import device_name

RESULTS = Path(__file__).parents[1] / "results" / "models"
MODELS = {
    "Qwen2.5-1.5B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "Llama-3-8B": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=False,
        ),
    ),
    "tiny": (
        Qwen2ForCausalLM,
        Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=256,
        ),
    ),
}
SPARSITIES = 0.0, 0.2, 0.35, 0.5
MULTIPLE = 128  # of a width
PLAIN, OURS = "transformers", "prunekit"


def width_at(dense: int, sparsity: float) -> int:
    """The neurons left, as many as a multiple of 128 allows (64 of the rehearsal's)."""
    multiple = min(MULTIPLE, dense // 2)
    return round(dense * (1 - sparsity) / multiple) * multiple


def build(name: str, width: int, device: torch.device) -> nn.Module:
    """A model of this width with random weights, bf16."""
    kind, config = MODELS[name]
    config = type(config)(**config.to_dict() | {"intermediate_size": width})
    with torch.device(device):
        return kind._from_config(config, dtype=torch.bfloat16).eval()


def prefill(model: nn.Module, tokens: int) -> Callable[[], torch.Tensor]:
    """What reads one prompt and predicts a token."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def decode(model: nn.Module, batch: int, context: int) -> Callable[[], torch.Tensor]:
    """What decodes one token of each sequence behind ``context`` others, at the same place again.

    Nothing in it depends on values that the host would have to read, so it can be captured.
    """
    cache = StaticCache(config=model.config, max_cache_len=context + 128)
    keyword = {cache_keyword(model): cache}
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    step = model(input_ids=ids, use_cache=True, logits_to_keep=1, **keyword).logits.argmax(-1)
    place = torch.full((batch, 1), context, device=model.device)

    def run() -> torch.Tensor:
        out = model(input_ids=step, position_ids=place, use_cache=True, **keyword)
        for layer in cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if isinstance(length, torch.Tensor):
                length.sub_(1)
        return out.logits[:, -1:].argmax(-1)

    return run


def measure(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time a model at every sparsity, plain and through prunekit, all in turn."""
    timer = timer_for(device)
    runs: dict[tuple[float, str, str], Callable[[], object]] = {}
    facts: dict[float, dict[str, int]] = {}
    dense = MODELS[name][1].intermediate_size
    for sparsity in SPARSITIES:
        plain = build(name, width_at(dense, sparsity), device)
        width = plain.config.intermediate_size
        facts[sparsity] = {"width": width, "parameters": parameter_count(plain)}
        for way, model in ((PLAIN, plain), (OURS, compact_modules(twin(plain)))):
            for batch in options.batch:
                step = decode(model, batch, options.context)
                runs[sparsity, way, f"decode {batch}"] = timer.capture(step)[0]
            runs[sparsity, way, f"prefill {options.prompt}"] = prefill(model, options.prompt)
    once = {key: partial(timer.seconds, run) for key, run in runs.items()}
    return [
        {"model": name, "sparsity": sparsity, "way": way, "test": test}
        | facts[sparsity]
        | asdict(summary)
        for (sparsity, way, test), summary in race(once, options.rounds).items()
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.model", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the steps")
    add("--models", nargs="+", choices=tuple(MODELS), default=["Qwen2.5-1.5B", "Llama-3-8B"])
    add("--batch", type=int, nargs="+", default=[1, 8], help="sequences that decode together")
    add("--context", type=int, default=512, help="tokens behind which one is decoded")
    add("--prompt", type=int, default=4096, help="tokens of the prefill")
    add("--rounds", type=int, default=15, help="timings of each")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    add("--revision", help="of the sources, where git does not know it")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "python -m bench.gpu.model: torch sees no GPU; --device cpu rehearses", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    path = options.out / f"{safe_name(device_name())}.json"
    about = environment(device, arguments, options.revision, module="bench.gpu.model")
    kind = MEASURED if device.type == "cuda" else REHEARSED
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        with torch.inference_mode():
            rows += measure(name, options, device)
        gc.collect()
        write_json(path, {"schema": SCHEMA, "kind": kind, "environment": about, "rows": rows})
    for row in rows:
        print(*(row[k] for k in ("model", "width", "way", "test")), f"{row['median'] * 1e3:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
