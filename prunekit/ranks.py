"""The processes of one run, as torchrun starts them: who does which share, and how sums meet.

Where there is one process, it does everything and adds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def started() -> int:
    """How many processes torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def meeting() -> Iterator[int]:
    """Inside, the processes of a run can add up; yields the rank of this one.

    gloo joins tensors on CPUs, nccl those on GPUs, of which each process takes its own.
    """
    if started() == 1:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Every so-many-th item, from this process's own on; there may be none."""
    return items[dist.get_rank() :: dist.get_world_size()] if _together() else items


def add_up_(tensors: Iterable[torch.Tensor | None]) -> None:
    """Make each tensor the sum of it in all processes, in place; all of them must call this."""
    if _together():
        for tensor in tensors:
            if tensor is not None:
                dist.all_reduce(tensor)


def largest_(tensor: torch.Tensor) -> None:
    """Make a tensor the largest of it in all processes, element by element, in place."""
    if _together():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
