"""Build of the extensions: fastmim._C and fastmim._PLANS where torch and a C++ compiler are installed.

FASTMIM_BUILD_CPP=0 leaves them out; without torch in the build environment the package is pure Python. fastmim._CUDA is
built where a GPU is visible or FASTMIM_BUILD_CUDA=1 (0 leaves it out), with or without fastmim._C, for
TORCH_CUDA_ARCH_LIST, by the nvcc of CUDA_HOME, of PATH or of NVIDIA's packages from PyPI.
"""

import importlib.util
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
    """Return the extension modules and the command that builds them; without them, print the reason."""
    reason = None
    if sys.platform == "win32":
        reason = "the sources are written for gcc and clang"
    elif not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        reason = "no C++ compiler on PATH (CXX)"
    else:
        try:
            import pybind11  # noqa: F401
            from torch.utils.cpp_extension import BuildExtension
        except ImportError as error:
            reason = f"{error.name} is not in the build environment (pip install --no-build-isolation)"
    if reason:
        if os.environ.get("FASTMIM_BUILD_CUDA") == "1":
            sys.exit(f"fastmim: FASTMIM_BUILD_CUDA=1, but {reason}")
        print(f"fastmim: installing without C++ kernels: {reason}", file=sys.stderr)
        return {}
    modules = [*cpp(), *cuda()]
    if not modules:
        return {}

    class Build(BuildExtension):
        def build_extensions(self):
            named = self.compiler.object_filenames

            def object_filenames(sources, *args, **options):
                # csrc/cuda/attention.cu and attention.cpp would be one object file
                kinds = [".cuda" * str(source).endswith(".cu") for source in sources]
                paths = map(Path, named(sources, *args, **options))
                return [str(path.with_name(path.stem + kind + path.suffix)) for path, kind in zip(paths, kinds)]

            self.compiler.object_filenames = object_filenames
            try:
                super().build_extensions()
            except (RuntimeError, subprocess.CalledProcessError) as error:
                without = "FASTMIM_BUILD_CPP=0 installs without C++ kernels, FASTMIM_BUILD_CUDA=0 without CUDA's"
                sys.exit(f"fastmim: compiling csrc/ failed ({error}); {without}")

    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


def cpp():
    """Return the extension of CPU kernels and that of launch plans, an empty list if they are not wanted."""
    from torch.utils.cpp_extension import CppExtension

    if os.environ.get("FASTMIM_BUILD_CPP") == "0":
        print("fastmim: installing without C++ kernels: FASTMIM_BUILD_CPP=0", file=sys.stderr)
        return []
    flags, link = list(FLAGS), ["-fopenmp"]
    if os.environ.get("FASTMIM_SANITIZE") == "1":
        checks = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
        flags, link = [*flags, *checks, "-O1"], [*link, *checks]
    sources = ["csrc/library.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    plans = sorted(map(str, Path("csrc/plans").glob("*.cpp")))
    headers = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inl"})
    return [
        CppExtension("fastmim._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=link),
        CppExtension("fastmim._PLANS", plans, depends=headers, extra_compile_args=flags, extra_link_args=link),
    ]


def compilers():
    """Yield the paths of nvcc in the order of preference, None for those that are missing."""
    if "CUDA_HOME" in os.environ:
        yield shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    yield shutil.which("nvcc")
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations if packages else []:
        yield from sorted(map(str, Path(place).glob("cu*/bin/nvcc")))


def toolkit(version):
    """Return the folder of the toolkit of CUDA `version` and None, or None and the reason that there is none."""
    found = []
    for nvcc in filter(None, compilers()):
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.\d+", output)
        # nvcc may be a script in another folder than the toolkit
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
        if top and release and release[1] == version.partition(".")[0]:
            return os.path.realpath(top[1].strip()), None
        found.append(f"{nvcc} is of CUDA {release[0].split()[1]}" if release else f"{nvcc} does not run")
    if found:
        return None, f"torch is built for CUDA {version}, and {', '.join(found)}"
    return None, "there is no nvcc in CUDA_HOME, on PATH or from PyPI: pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart]'"


def architectures(wanted):
    """Return the architectures of a TORCH_CUDA_ARCH_LIST that the kernels are written for; print the others."""
    names = wanted.replace(" ", ";").strip(";").split(";")
    left_out = [name for name in names if re.match(r"[1-7]\.", name)]
    if left_out:
        print(f"fastmim: no CUDA C++ kernels for {', '.join(left_out)}: they need 8.0", file=sys.stderr)
    return ";".join(name for name in names if name and name not in left_out)


def cuda():
    """Return the extension of CUDA kernels in a list, empty, with the reason printed, if it can't be built."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("FASTMIM_BUILD_CUDA")
    if wanted == "0" or (wanted != "1" and not torch.cuda.is_available()):
        return []
    home, reason = toolkit(torch.version.cuda) if torch.version.cuda else (None, "this torch is a CPU build")
    targets = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    if not reason and not targets:
        reason = "TORCH_CUDA_ARCH_LIST names no architecture that the kernels are written for"
    if reason:
        if wanted == "1":
            sys.exit(f"fastmim: FASTMIM_BUILD_CUDA=1, but {reason}")
        print(f"fastmim: installing without CUDA C++ kernels: {reason}", file=sys.stderr)
        return []
    cpp_extension.CUDA_HOME, os.environ["TORCH_CUDA_ARCH_LIST"] = home, targets
    sources = sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.suffix in {".cu", ".cpp"})
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    flags = {
        "cxx": ["-O2", "-g0", f'-DFASTMIM_CUDA_ARCHITECTURES="{targets}"'],
        "nvcc": ["-O3", "-std=c++17"],
    }
    module = cpp_extension.CUDAExtension("fastmim._CUDA", sources, depends=headers, extra_compile_args=flags)
    # the packages from PyPI have the library by its full name alone
    module.libraries.remove("cudart")
    module.extra_link_args = [f"-l:libcudart.so.{torch.version.cuda.partition('.')[0]}"]
    return [module]


if __name__ == "__main__":
    setup(
        # kernels/ lies beside the package and is installed inside it, as fastmim.kernels
        packages=[*find_packages(include=["fastmim", "fastmim.*"], exclude=["fastmim.kernels*"]), "fastmim.kernels"],
        package_dir={"fastmim.kernels": "kernels"},
        package_data={
            "fastmim": ["py.typed", "_C.pyi", "_CUDA.pyi", "_PLANS.pyi", "cuda_first.json", "train/configs/*.toml"]
        },
        **native(),
    )
