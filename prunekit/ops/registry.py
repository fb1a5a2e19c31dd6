"""One place where an operation gets its schema, its reference, its fake kernel and its backends.

An operation is defined once in the dispatcher as ``prunekit::NAME``. Its reference serves every
device; a faster implementation takes over a device by being registered for it: the C++ extension
registers itself for the CPU when it is loaded, Triton kernels for CUDA. Nothing else decides which
code runs, unless ``PRUNEKIT_BACKEND`` (or ``force_backend``) names a backend.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
LIBRARY = torch.library.Library("prunekit", "DEF")


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this operation here."""


@dataclass
class Operation:
    """What prunekit knows of one operation besides the dispatcher's own table."""

    name: str
    reference: Callable[..., Any]
    backends: dict[str, Callable[..., Any]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


OPERATIONS: dict[str, Operation] = {}
_forced: str | None = None


def _check_backend(name: str | None) -> str | None:
    if name and name not in BACKENDS:
        raise BackendError(f"PRUNEKIT_BACKEND: got {name!r}; expected one of {', '.join(BACKENDS)}")
    return name or None


def forced_backend() -> str | None:
    """The backend that was forced, or None where the dispatcher chooses by device."""
    return _forced


@contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Make every operation use one backend inside a ``with`` block, or raise BackendError."""
    global _forced
    before, _forced = _forced, _check_backend(name)
    try:
        yield
    finally:
        _forced = before


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    """Define ``prunekit::NAME`` from its schema, with the reference for all devices."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, unless_forced(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"prunekit::{name}", fake, lib=LIBRARY)
    operation = OPERATIONS[name] = Operation(name, reference, {"reference": reference})
    return operation


def check_forced() -> None:
    """Raise BackendError where PRUNEKIT_BACKEND names none; importing prunekit does not."""
    _check_backend(_forced)


def _forced_kernel(name: str) -> Callable[..., Any]:
    check_forced()
    operation = OPERATIONS[name]
    kernel = operation.backends.get(_forced)
    if kernel is None:
        why = operation.unavailable.get(_forced, "it has no such implementation")
        raise BackendError(
            f"{name}: backend {_forced} cannot serve it: {why}; "
            f"have {', '.join(operation.backends)}"
        )
    return kernel


def unless_forced(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what the dispatcher calls for an operation, so that a forced backend serves instead."""

    @functools.wraps(kernel)
    def serve(*args: Any) -> Any:
        return (kernel if _forced is None else _forced_kernel(name))(*args)

    return serve


def call(name: str, *args: Any) -> Any:
    """Run an operation: through the dispatcher, or on the forced backend alone."""
    if _forced is None:
        return getattr(torch.ops.prunekit, name).default(*args)
    return _forced_kernel(name)(*args)


_forced = os.environ.get("PRUNEKIT_BACKEND") or None
