"""The one imperative step: build fastmim._C where torch and a C++ compiler are at hand.

FASTMIM_BUILD_CPP=0 leaves it out; without torch in the build environment the package is pure Python. fastmim._CUDA is
built beside it where a GPU is visible or FASTMIM_BUILD_CUDA=1 (0 leaves it out), for TORCH_CUDA_ARCH_LIST.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ARCHITECTURES = "8.0;9.0a;10.0+PTX"
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
            named = self.compiler.object_filenames

            def object_filenames(sources, *args, **options):
                # csrc/cuda/attention.cu and attention.cpp are two objects
                kinds = [".cuda" * str(source).endswith(".cu") for source in sources]
                paths = map(Path, named(sources, *args, **options))
                return [str(path.with_name(path.stem + kind + path.suffix)) for path, kind in zip(paths, kinds)]

            self.compiler.object_filenames = object_filenames
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
    return {"ext_modules": [module, *cuda()], "cmdclass": {"build_ext": Build}}


def toolkit():
    """Where the CUDA toolkit lies; None without nvcc. Where nvcc is a script that calls another, --dryrun says TOP."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if not nvcc:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else None


def cuda():
    """The extension of CUDA kernels, or nothing, with a line that says why."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("FASTMIM_BUILD_CUDA")
    if wanted == "0" or (wanted != "1" and not torch.cuda.is_available()):
        return []
    home = toolkit()
    if torch.version.cuda is None or home is None:
        reason = "this torch is a CPU build" if torch.version.cuda is None else "no nvcc in CUDA_HOME or on PATH"
        if wanted == "1":
            sys.exit(f"fastmim: FASTMIM_BUILD_CUDA=1, but {reason}")
        print(f"fastmim: installing without CUDA C++ kernels: {reason}", file=sys.stderr)
        return []
    cpp_extension.CUDA_HOME = home
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    sources = sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.suffix in {".cu", ".cpp"})
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    name = f'-DFASTMIM_CUDA_ARCHITECTURES="{architectures}"'
    flags = {"cxx": ["-O2", "-g0", name.replace('"', '\\"')], "nvcc": ["-O3", "-std=c++17"]}
    return [cpp_extension.CUDAExtension("fastmim._CUDA", sources, depends=headers, extra_compile_args=flags)]


setup(
    # kernels/ stands beside the package and installs inside it, as fastmim.kernels
    packages=[*find_packages(include=["fastmim", "fastmim.*"], exclude=["fastmim.kernels*"]), "fastmim.kernels"],
    package_dir={"fastmim.kernels": "kernels"},
    package_data={"fastmim": ["py.typed", "_C.pyi", "_CUDA.pyi", "train/configs/*.toml"]},
    **native(),
)
