"""What every benchmark of an operation begins with: its options, its seed, and its heading."""

from __future__ import annotations

import argparse

import torch

from prunekit.measure.provenance import device_name
from prunekit.ops.isa import cpu_isa


def start(description: str) -> int:
    """Parse --rounds and --threads, print the machine, and return the rounds."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{device_name()}, {cpu_isa() or 'extension not built'}, {options.rounds} rounds")
    return options.rounds
