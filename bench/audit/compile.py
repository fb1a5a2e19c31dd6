"""Every specialisation compiled once, in two processes; what was read from it is kept on disk."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from bench.audit import binary, occupancy
from bench.audit.binary import Figures
from bench.audit.specialise import Specialisation, target_of

CACHE = Path(__file__).parents[2] / "build" / "audit"
_WORKERS = 2

# What the workers, which are forked, find here: kernels cannot be sent to another process.
_work: list[Specialisation] = []


def _compile(index: int) -> tuple[int, Figures | str]:
    work = _work[index]
    try:
        compiled = triton.compile(
            work.source, target=target_of(work.arch), options=dict(work.options)
        )
        return index, binary.analyse(compiled)
    except Exception as error:  # whatever the compiler raises is a finding, not the audit's end
        return index, f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _place(work: Specialisation, cache: Path) -> Path:
    readers = b"".join(Path(module.__file__).read_bytes() for module in (binary, occupancy))
    made_from = f"{triton.__version__}-{work.key}".encode() + readers
    return cache / (hashlib.sha256(made_from).hexdigest() + ".json")


def compile_all(
    specialisations: Iterable[Specialisation], cache: Path = CACHE
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Compile each key once.

    Args:
        specialisations: repeated keys are compiled once.
        cache: a folder; it is made if it is not there.

    Returns:
        By key, the figures of what compiled, and the errors of what did not.
    """
    work = {s.key: s for s in specialisations}
    cache.mkdir(parents=True, exist_ok=True)
    figures, errors = {}, {}
    for key, one in work.items():
        if (place := _place(one, cache)).exists():
            figures[key] = Figures(**json.loads(place.read_text()))

    _work[:] = [one for key, one in work.items() if key not in figures]
    with tempfile.TemporaryDirectory() as binaries:
        os.environ["TRITON_CACHE_DIR"] = binaries
        with multiprocessing.get_context("fork").Pool(_WORKERS) as pool:
            for index, result in pool.imap_unordered(_compile, range(len(_work))):
                one = _work[index]
                if isinstance(result, str):
                    errors[one.key] = result
                else:
                    figures[one.key] = result
                    _place(one, cache).write_text(json.dumps(asdict(result)))
    return figures, errors
