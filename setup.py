"""Builds the C++ extension where torch and a compiler are at hand; elsewhere installs without.

The CUDA kernels come with it where torch has CUDA and nvcc is found.
"""

import os
import sys
from glob import glob

from setuptools import setup

STABLE_ABI_OF_TORCH_2_10 = "0x020a000000000000"
# The vectors that cross functions are inlined away, and GCC 12 warns of its own AVX-512 header.
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
FLAGS += os.environ.get("CFLAGS", "").split()  # last, so that they win


def note(text: str) -> None:
    print(f"prunekit: {text}", file=sys.stderr)


def has_cuda(torch_cuda: str | None, cuda_home: str | None) -> bool:
    """Whether torch is built for CUDA, and a compiler for it lies where torch expects one."""
    if torch_cuda is None:
        return False
    if cuda_home is None or not os.path.exists(os.path.join(cuda_home, "bin", "nvcc")):
        note("torch has CUDA but nvcc was not found, so the CUDA kernels are left out")
        return False
    return True


def modules(cuda: bool) -> list:
    """The extension with the CUDA kernels, if it may have them, and without, to fall back on."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    def module(kind, sources: list[str], flags: dict | list, **macros: str):
        return kind(
            "prunekit._C",
            sorted(sources),
            depends=sorted(
                path for ext in ("h", "inl") for path in glob(f"csrc/**/*.{ext}", recursive=True)
            ),
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI_OF_TORCH_2_10), *macros.items()],
            extra_compile_args=flags,
            py_limited_api=True,
        )

    cpu_sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    cpu = module(CppExtension, cpu_sources, FLAGS)
    if not cuda:
        return [cpu]
    cuda_sources = glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")
    flags = {"cxx": FLAGS, "nvcc": ["-std=c++17", "-O3"]}
    return [module(CUDAExtension, cpu_sources + cuda_sources, flags, USE_CUDA="1"), cpu]


def extension() -> dict:
    """The arguments of setup() that concern the extension; none of them where torch is missing."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension
    except ImportError:
        asked_only = {"egg_info", "dist_info"} & set(sys.argv)  # nothing is built yet
        if not asked_only:
            note(
                "torch is not importable here, so the C++ extension is left out; to have it, "
                "install torch and run `pip install --no-build-isolation .`"
            )
        return {}

    attempts = modules(has_cuda(torch.version.cuda, CUDA_HOME))

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            compiler = self.compiler  # a name, which building replaces by what compiles
            for module, instead in zip(attempts, [*attempts[1:], None], strict=True):
                self.compiler = compiler
                self.extensions = self.distribution.ext_modules = [module]
                try:
                    super().run()
                    return
                except Exception as error:
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    what = "the CUDA kernels are" if instead else "the C++ extension is"
                    note(f"warning: {what} left out, since it did not compile: {reason}")
            self.extensions = self.distribution.ext_modules = []

    return {
        "ext_modules": attempts[:1],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
