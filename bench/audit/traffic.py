"""Metered runs of every operation: bytes moved against its formula, and strays.

`python -m bench.audit.traffic` interprets Triton, so it is a process of its own; it prints one JSON
line for each run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

STREAMING = 1.05
PRODUCT = 1.15
ARCHITECTURES = ("sm_90", "gfx942")


@dataclass(frozen=True)
class Result:
    """One metered run: what it moved against what its formula says, and its stray lanes."""

    operation: str
    arch: str
    shape: str
    moved: int
    ideal: int
    limit: float
    strays: int

    @property
    def ratio(self) -> float:
        return self.moved / self.ideal

    def findings(self) -> list[str]:
        """Return the lines of what is wrong with it."""
        what = f"{self.operation} {self.arch} {self.shape}"
        lines = []
        if self.ratio > self.limit:
            lines.append(f"{what}: moved/ideal {self.ratio:.3f}, at most {self.limit}")
        if self.strays:
            lines.append(f"{what}: {self.strays} active lanes outside every tensor")
        return lines


@dataclass(frozen=True)
class Run:
    """A host function to meter on small tensors, and the formula for what it has to move.

    ``call`` runs it on inputs that lie apart; ``ideal`` gives bytes, from the launches that were
    metered, because tiles and workspaces depend on the configuration.
    """

    operation: str
    shape: str
    call: Callable[[], object]
    ideal: Callable[[list], float]
    limit: float = STREAMING


def meter(run: Run, arch: str) -> Result:
    """Run with the configuration that this architecture would get."""
    from bench.audit.meter import metered
    from prunekit_kernels.launch import assumed

    with metered() as counted, assumed(arch):
        run.call()
    return Result(
        run.operation,
        arch,
        run.shape,
        counted.moved,
        round(run.ideal(counted.launches)),
        run.limit,
        counted.strays,
    )


def _numbers(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    from bench.audit.meter import apart

    return apart(torch.randn(*shape).mul(0.5).to(dtype))


def _gated_act_stats() -> Run:
    from prunekit_kernels.gated_act_stats import gated_act_stats_triton

    tokens, width = 230, 600
    gate, up = _numbers(tokens, width), _numbers(tokens, width)
    spans = torch.tensor([[2, 90], [90, 200]])

    def ideal(launches) -> float:
        programs = launches[-1].arguments["programs"]
        # gate, up and h; five sums of each program, written and read; 2 + 4 results.
        return 3 * tokens * width * 2 + 40 * width * programs + 4 * (2 + 4) * width

    return Run(
        "gated_act_stats",
        f"T {tokens}, F {width}, fp16",
        lambda: gated_act_stats_triton(gate, up, spans, 0),
        ideal,
    )


RUNS = (_gated_act_stats,)


def results() -> Iterator[Result]:
    torch.manual_seed(0)
    for run in (make() for make in RUNS):
        for arch in ARCHITECTURES:
            yield meter(run, arch)


def start() -> subprocess.Popen:
    """Start the metered runs in a process that interprets."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench.audit.traffic"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> list[Result]:
    """Wait for them.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the metered runs failed:\n{err}")
    return [Result(**json.loads(line)) for line in out.splitlines()]


def main() -> None:
    for result in results():
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
