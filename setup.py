"""Builds the C++ extension where torch and a compiler are at hand; elsewhere installs without."""

import sys
from glob import glob

from setuptools import setup

STABLE_ABI_OF_TORCH_2_10 = "0x020a000000000000"
# The vectors that cross functions are inlined away, and GCC 12 warns of its own AVX-512 header.
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def note(text: str) -> None:
    print(f"prunekit: {text}", file=sys.stderr)


def extension() -> dict:
    """The arguments of setup() that concern the extension; none of them where torch is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        asked_only = {"egg_info", "dist_info"} & set(sys.argv)  # nothing is built yet
        if not asked_only:
            note(
                "torch is not importable here, so the C++ extension is left out; to have it, "
                "install torch and run `pip install --no-build-isolation .`"
            )
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                note(f"warning: the C++ extension is left out, it did not compile: {reason}")
                self.extensions = self.distribution.ext_modules = []

    module = CppExtension(
        "prunekit._C",
        sorted(glob("csrc/**/*.cpp", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)),
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI_OF_TORCH_2_10)],
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
