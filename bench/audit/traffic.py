"""Metered runs of every operation: bytes moved against formulas, and strays.

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

from bench.audit.formulas import FORMULAS

ARCHITECTURES = ("sm_90", "gfx942")


@dataclass(frozen=True)
class Result:
    """What a kernel moved in one run against what its formula says, and its stray lanes."""

    operation: str
    kernel: str
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
        what = f"{self.operation}/{self.kernel} {self.arch} {self.shape}"
        lines = []
        if self.ratio > self.limit:
            lines.append(f"{what}: moved/ideal {self.ratio:.3f}, at most {self.limit}")
        if self.strays:
            lines.append(f"{what}: {self.strays} active lanes outside every tensor")
        return lines


@dataclass(frozen=True)
class Run:
    """A host function to meter, called on small fp16 tensors that lie apart."""

    operation: str
    shape: str
    call: Callable[[], object]


def meter(run: Run, arch: str, formulas=FORMULAS) -> list[Result]:
    """Run with the configuration that this architecture would get; one result for each kernel."""
    from bench.audit.meter import metered
    from prunekit_kernels.launch import assumed

    with metered() as counted, assumed(arch):
        run.call()
    results = []
    for kernel in dict.fromkeys(launch.kernel for launch in counted.launches):
        launches = [launch for launch in counted.launches if launch.kernel == kernel]
        ideal, limit = formulas[kernel]
        results.append(
            Result(
                run.operation,
                kernel,
                arch,
                run.shape,
                sum(launch.moved for launch in launches),
                sum(ideal(launch.arguments) for launch in launches),
                limit,
                sum(launch.strays for launch in launches),
            )
        )
    return results


def _numbers(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    from bench.audit.meter import apart

    return apart(torch.randn(*shape).mul(0.1).to(dtype))


def _weights(hidden: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _numbers(width, hidden), _numbers(width, hidden), _numbers(hidden, width)


# Sizes are whole sectors, and no multiples of any block: every mask has lanes to hold back.
_SPANS = torch.tensor([[2, 90], [90, 170]])


def _gated_act_stats() -> Run:
    from prunekit_kernels.gated_act_stats import gated_act_stats_triton

    gate, up = _numbers(190, 592), _numbers(190, 592)
    return Run(
        "gated_act_stats",
        "T 190, F 592",
        lambda: gated_act_stats_triton(gate, up, _SPANS, 0),
    )


def _prefill() -> Run:
    from prunekit_kernels.gated_mlp_prefill import gated_mlp_prefill_stats

    x, weights = _numbers(190, 336), _weights(336, 208)
    biases = _numbers(208), _numbers(208), _numbers(336)
    return Run(
        "gated_mlp_prefill_stats",
        "T 190, D 336, F 208",
        lambda: gated_mlp_prefill_stats(x, *weights, *biases, _SPANS, 0),
    )


def _decode(tokens: int) -> Run:
    from prunekit_kernels.gated_mlp_decode import gated_mlp_decode

    x, weights = _numbers(tokens, 592), _weights(592, 1104)
    return Run(
        f"gated_mlp_decode@{tokens}",
        f"T {tokens}, D 592, F 1104",
        lambda: gated_mlp_decode(x, *weights, None, None, None, 0),
    )


def _indexed() -> Run:
    from bench.audit.meter import apart
    from prunekit_kernels.gated_mlp_decode import gated_mlp_decode

    x, weights = _numbers(1, 592), _weights(592, 1104)
    index = apart(torch.randperm(1104)[:720].sort().values)
    return Run(
        "gated_mlp_indexed",
        "T 1, D 592, F 720 of 1104",
        lambda: gated_mlp_decode(x, *weights, None, None, None, 0, index),
    )


def _gram_update() -> Run:
    from prunekit_kernels.gram_update import gram_update_triton

    gram, h = _numbers(304, 304, dtype=torch.float32), _numbers(190, 304)
    return Run("gram_update", "T 190, F 304", lambda: gram_update_triton(gram, h))


def _backward() -> Run:
    from prunekit_kernels.gated_mlp_backward import gated_mlp_backward

    x, grad_y, weights = _numbers(190, 336), _numbers(190, 336), _weights(336, 208)
    biases = _numbers(208), _numbers(208)
    return Run(
        "gated_mlp_backward",
        "T 190, D 336, F 208",
        lambda: gated_mlp_backward(grad_y, x, *weights, *biases, 0, (True,) * 7),
    )


RUNS = (
    _gated_act_stats,
    _prefill,
    lambda: _decode(1),
    lambda: _decode(8),
    _indexed,
    _gram_update,
    _backward,
)


def results() -> Iterator[Result]:
    torch.manual_seed(0)
    for run in (make() for make in RUNS):
        for arch in ARCHITECTURES:
            yield from meter(run, arch)


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
