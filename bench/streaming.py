"""Pruning a checkpoint on disk against copying it: time, interleaved, and peak memory.

A sharded checkpoint of Llama's layout with random bf16 weights is made once in --folder. Each
round runs `cp -r` and `prunekit prune --no-load --strategy random`, each as a process of its own;
the page cache is as the one before left it, and both sync what they wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import transformers

from prunekit.checkpoint.shards import INDEX, Shards
from prunekit.tensors import write_shard

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
SHAPE |= {"num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}
SHARD_BYTES = 4 << 30


def make(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint of about so many GB: as many layers as it takes."""
    config = transformers.LlamaConfig(num_hidden_layers=1, dtype="bfloat16", **SHAPE)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    layer = 2 * sum(p.numel() for p in model.model.layers.parameters())
    rest = 2 * sum(p.numel() for p in model.parameters()) - layer
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - rest) / layer))
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        named = transformers.LlamaForCausalLM(config).named_parameters()
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, parameter in named:
        if size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, "BF16", tuple(parameter.shape)))
        size += 2 * parameter.numel()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for i, planned in enumerate(groups, 1):
        path = folder / f"model-{i:05}-of-{len(groups):05}.safetensors"
        values = (0.02 * torch.randn(s, generator=generator).bfloat16() for _, _, s in planned)
        write_shard(path, planned, values, {"format": "pt"})
        weight_map |= dict.fromkeys([name for name, _, _ in planned], path.name)
        total += sum(2 * prod(shape) for _, _, shape in planned)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


def timed(command: list[str], out: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command that writes a folder, synced."""
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begun, 1024 * usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for three")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--sparsity", type=float, default=0.35)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dense = options.folder / f"dense-{options.gigabytes:g}GB"
    if not (dense / INDEX).exists():
        shutil.rmtree(dense, ignore_errors=True)
        # In a process of its own: what it takes would count for every child that comes after.
        maker = get_context("spawn").Process(target=make, args=(dense, options.gigabytes))
        maker.start()
        maker.join()
    shards = Shards(dense)
    largest = max(entry.size for entry in shards)
    total = sum(entry.size for entry in shards)
    print(
        f"{total / 1e9:.2f} GB, {len(shards.shards)} shards; largest tensor {largest / 1e6:.0f} MB"
    )
    copy, pruned = options.folder / "copy", options.folder / "pruned"
    prune = [sys.executable, "-m", "prunekit", "prune", str(dense), "--no-load", "--strategy"]
    prune += ["random", "--sparsity", str(options.sparsity), "--quiet", "-o", str(pruned)]
    seconds: dict[str, list[float]] = {"cp": [], "prune": []}
    peak = 0
    for _ in range(options.rounds):
        seconds["cp"].append(timed(["cp", "-r", str(dense), str(copy)], copy)[0])
        took, memory = timed(prune, pruned)
        seconds["prune"].append(took)
        peak = max(peak, memory)
        print(
            f"cp {seconds['cp'][-1]:.1f} s, prune {took:.1f} s, peak {memory / 1e6:.0f} MB",
            flush=True,
        )
    ratio = median(p / c for p, c in zip(seconds["prune"], seconds["cp"], strict=True))
    bound = 600e6 + 3 * largest
    print(f"prune takes {ratio:.2f} x cp's time; peak {peak / 1e6:.0f} of {bound / 1e6:.0f} MB")
    shutil.rmtree(copy)
    shutil.rmtree(pruned)


if __name__ == "__main__":
    main()
