"""Counts what kernels move in Triton's interpreter, and every lane that reads or writes nowhere.

The interpreter follows any address, so an index that leaves its tensor goes unnoticed there, and so
does a tensor that is read twice. In here every load and store is counted by 32-byte sectors, and an
active lane outside all tensors is a stray: counted, and not followed. Tensors that are made in here
lie apart, so that a lane that leaves one cannot land in the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.audit.formulas import SECTOR

_GAP = 1 << 18  # bytes around each tensor
_FACTORIES = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}


@dataclass
class Counts:
    """What one launch moved: bytes of its active lanes, distinct sectors of each instruction."""

    kernel: str
    arguments: dict[str, object]
    bytes: Counter = field(default_factory=Counter)  # "load" and "store"
    sectors: Counter = field(default_factory=Counter)
    strays: int = 0

    @property
    def moved(self) -> int:
        """Bytes as memory moves them, in whole sectors."""
        return SECTOR * self.sectors.total()


class _Elements:
    """The addresses of a tensor's own elements."""

    def __init__(self, tensor: torch.Tensor):
        self.start = tensor.data_ptr()
        self.item = tensor.element_size()
        dims = [
            (st, n) for n, st in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and st
        ]
        self.dims = sorted(dims, reverse=True)
        extent = sum(stride * (size - 1) for stride, size in dims) + 1 if tensor.numel() else 0
        self.end = self.start + extent * self.item

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Return where an address is that of an element."""
        inside = (addresses >= self.start) & (addresses < self.end)
        offsets = np.where(inside, addresses - np.uint64(self.start), 0).astype(np.int64)
        inside &= offsets % self.item == 0
        offsets //= self.item
        for stride, size in self.dims:
            inside &= offsets // stride < size
            offsets %= stride
        return inside & (offsets == 0)


class _Apart(TorchDispatchMode):
    """Gives every new tensor gaps on either side."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in _FACTORIES or result.device.type != "cpu":
            return result
        return _apart(result)


def _apart(like: torch.Tensor) -> torch.Tensor:
    gap = _GAP // like.element_size()
    room = torch.ops.aten.empty.memory_format([like.numel() + 2 * gap], dtype=like.dtype)
    return room[gap : gap + like.numel()].view(like.shape)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy with gaps on either side."""
    return _apart(tensor).copy_(tensor)


class Meter:
    """The counts of every launch inside `metered`, in order."""

    def __init__(self) -> None:
        self.launches: list[Counts] = []
        self._tensors: list[_Elements] = []

    @property
    def strays(self) -> int:
        return sum(counts.strays for counts in self.launches)

    @property
    def moved(self) -> int:
        return sum(counts.moved for counts in self.launches)

    def begin(self, kernel, args: tuple, named: dict) -> None:
        """Start counting a launch; its tensors are where lanes may go."""
        arguments = {
            name: value.base if isinstance(value, TensorDescriptor) else value
            for name, value in (dict(zip(kernel.arg_names, args, strict=False)) | named).items()
        }
        self._tensors = [
            _Elements(value)
            for value in arguments.values()
            if isinstance(value, torch.Tensor) and value.numel()
        ]
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        self.launches.append(Counts(name, arguments))

    def count(self, kind: str, pointers, active: np.ndarray) -> np.ndarray:
        """Count an instruction, and return which of its lanes go where they may."""
        active = np.broadcast_to(active, pointers.data.shape)
        addresses = pointers.data[active]
        item = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        held = np.zeros(addresses.shape, bool)
        for tensor in self._tensors:
            if held.all():
                break
            held |= tensor.holds(addresses)
        counts = self.launches[-1]
        counts.bytes[kind] += addresses.size * item
        # No element straddles two sectors: an address is a multiple of its element's size.
        counts.sectors[kind] += np.unique(addresses // SECTOR).size
        counts.strays += int(addresses.size - held.sum())
        allowed = active.copy()
        allowed[active] = held
        return allowed


@contextmanager
def metered() -> Iterator[Meter]:
    """Meter every Triton kernel launched inside; the process must interpret (TRITON_INTERPRET=1).

    Tensors made outside, inputs above all, lie apart only where they went through `apart`.
    """
    meter = Meter()
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, function.run
    atomics = builder.create_atomic_rmw, builder.create_atomic_cas

    def handle(mask: np.ndarray):
        return interpreter.TensorHandle(mask, interpreter.tl.int1)

    # What follows the mask comes by place, or by name where a descriptor is used.
    def counted_load(self, ptrs, mask, *rest, **named):
        allowed = handle(meter.count("load", ptrs, mask.data))
        return load(self, ptrs, allowed, *rest, **named)

    def counted_store(self, ptrs, value, mask, *rest, **named):
        allowed = handle(meter.count("store", ptrs, mask.data))
        return store(self, ptrs, value, allowed, *rest, **named)

    def counted_run(self, *args, grid, warmup, **named):
        meter.begin(self, args, named)
        return run(self, *args, grid=grid, warmup=warmup, **named)

    def refused(self, *args):
        raise TypeError("meter: atomics are not counted; reduce through a workspace, in order")

    try:
        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        builder.create_atomic_rmw = builder.create_atomic_cas = refused
        function.run = counted_run
        with _Apart():
            yield meter
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, builder.create_atomic_cas = atomics
        function.run = run
