"""From a recorded launch to exactly what Triton's runtime would compile for it.

Which arguments become constants and which are known to be multiples of 16 is decided by Triton's
own functions, those that `kernel[grid](...)` calls; only its driver, which wants a GPU, is left
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from prunekit_kernels.launch import Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942")


@dataclass(frozen=True)
class Specialisation:
    """What one binary is made from.

    ``key`` differs wherever the source, the types, the constants, the alignments, the options, the
    target or the compiler do.
    """

    name: str
    arch: str
    source: ASTSource
    options: dict[str, Any]
    key: str

    @property
    def config(self) -> str:
        """Block sizes and other constants, as in ``M128 N64 K64 w8 s3``."""
        names = self.source.fn.arg_names
        constants = {names[path[0]]: value for path, value in self.source.constants.items()}
        blocks = [
            f"{name.removeprefix('BLOCK_')}{value}"
            for name, value in constants.items()
            if name.startswith("BLOCK_")
        ]
        return " ".join(
            [*blocks, f"w{self.options['num_warps']}", f"s{self.options['num_stages']}"]
        )


@cache
def target_of(arch: str) -> GPUTarget:
    """Return Triton's target for sm_80, gfx942 and so on."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


@cache
def _backend(arch: str):
    return make_backend(target_of(arch))


@cache
def _backend_hash(arch: str) -> str:
    return _backend(arch).hash()  # of the compiler itself; asks ptxas for its version


@cache
def _option_names(arch: str) -> frozenset[str]:
    return frozenset(_backend(arch).parse_options({}).__dict__)


@cache
def _binder(kernel, arch: str):
    return create_function_from_signature(kernel.signature, kernel.params, _backend(arch))


def specialise(launch: Launch, arch: str) -> Specialisation:
    """Return what the runtime would compile for this launch on this architecture.

    Args:
        launch: recorded by `prunekit_kernels.launch.recorded` in a process that does not interpret
            Triton; its meta tensors count as aligned to 16 bytes, as torch's allocator aligns.
        arch: one of ARCHITECTURES.
    """
    kernel, backend = launch.kernel, _backend(arch)
    bound, types, _ = _binder(kernel, arch)(**launch.arguments, **launch.options)
    # The runtime always passes these, from the environment; the third since Triton 3.9.
    named = {"debug": False, "instrumentation_mode": "", "fpsan_homomorphic_casts": False}
    named = {k: v for k, v in named.items() if k in _option_names(arch)}
    options, signature, constants, attributes = kernel._pack_args(
        backend, named | launch.options, bound, types, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    key = "-".join([source.hash(), options.hash(), _backend_hash(arch)])
    return Specialisation(launch.name, arch, source, dict(options.__dict__), key)
