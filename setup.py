"""The one imperative step: build fastmim._C where torch and a C++ compiler are at hand.

FASTMIM_BUILD_CPP=0 leaves it out; without torch in the build environment the package is pure Python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fopenmp", "-Wno-unknown-pragmas", "-Wno-psabi"]


def native():
    """Extension modules and the commands that build them; a line says why there are none."""
    reason = None
    if os.environ.get("FASTMIM_BUILD_CPP") == "0":
        reason = "FASTMIM_BUILD_CPP=0"
    elif sys.platform == "win32":
        reason = "the sources are written for gcc and clang"
    elif not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        reason = "no C++ compiler on PATH (CXX)"
    else:
        try:
            import pybind11  # noqa: F401
            from torch.utils.cpp_extension import BuildExtension, CppExtension
        except ImportError as error:
            reason = f"{error.name} is not in the build environment (pip install --no-build-isolation)"
    if reason:
        print(f"fastmim: installing without C++ kernels: {reason}", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except (RuntimeError, subprocess.CalledProcessError) as error:
                sys.exit(f"fastmim: compiling csrc/ failed ({error}); FASTMIM_BUILD_CPP=0 installs without C++ kernels")

    flags, link = list(FLAGS), ["-fopenmp"]
    if os.environ.get("FASTMIM_SANITIZE") == "1":
        checks = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
        flags, link = [*flags, *checks, "-O1"], [*link, *checks]
    sources = ["csrc/library.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    headers = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inl"})
    module = CppExtension("fastmim._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=link)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    # kernels/ stands beside the package and installs inside it, as fastmim.kernels
    packages=[*find_packages(include=["fastmim", "fastmim.*"], exclude=["fastmim.kernels*"]), "fastmim.kernels"],
    package_dir={"fastmim.kernels": "kernels"},
    package_data={"fastmim": ["py.typed", "_C.pyi", "train/configs/*.toml"]},
    **native(),
)
