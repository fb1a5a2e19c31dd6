"""What every benchmark of an operation begins with: its options, its seed, and its heading."""

from __future__ import annotations

import argparse

import torch

from prunekit.measure.provenance import device_name
from prunekit.ops.isa import cpu_isa


def start(description: str) -> int:
    """Parse --rounds and --threads, print the machine, and return the rounds."""
    return begin(options_of(description).parse_args()).rounds


def options_of(description: str) -> argparse.ArgumentParser:
    """The options that every such benchmark has."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def begin(options: argparse.Namespace) -> argparse.Namespace:
    """Set the threads and the seed, print the machine, and return the options."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{device_name()}, {cpu_isa() or 'extension not built'}, {options.rounds} rounds")
    return options
