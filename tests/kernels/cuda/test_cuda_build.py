"""The toolkit that setup.py finds, the extension that it builds, and its errors."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Extension

from fastmim import _backends, info, kernels

ROOT = Path(__file__).parents[3]
CUDA = ROOT / "csrc" / "cuda"


@pytest.fixture(scope="module")
def setup():
    """Return setup.py as a module."""
    specification = importlib.util.spec_from_file_location("fastmim_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def nvcc(folder: Path, release: str) -> Path:
    """Write a script in place of nvcc, whose toolkit is in `folder`."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.88"\n'
        f'[ "$1" = --dryrun ] && echo "#$ TOP={folder}/bin/.." >&2\n'
        "exit 0\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(monkeypatch):
    """Hide every nvcc."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_toolkit_is_that_of_cuda_home_of_path_or_of_the_packages(setup, bare, tmp_path, monkeypatch):
    version = "13.0"
    assert setup.toolkit(version)[0] is None and "cuda-toolkit[nvcc" in setup.toolkit(version)[1]
    packages = tmp_path / "site-packages" / "nvidia"
    nvcc(packages / "cu13", version)
    found = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    found.submodule_search_locations = [str(packages)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert setup.toolkit(version) == (str(packages / "cu13"), None)
    on_path = nvcc(tmp_path / "installed", version).parent
    monkeypatch.setenv("PATH", str(on_path))
    assert setup.toolkit(version) == (str(tmp_path / "installed"), None)
    nvcc(tmp_path / "home", version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.toolkit(version) == (str(tmp_path / "home"), None)


def test_toolkit_of_another_release_is_passed_over_or_named(setup, bare, tmp_path, monkeypatch):
    old = nvcc(tmp_path / "old", "12.4")
    monkeypatch.setenv("PATH", str(old.parent))
    assert setup.toolkit("13.0") == (None, f"torch is built for CUDA 13.0, and {old} is of CUDA 12.4")
    nvcc(tmp_path / "new", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "new"))
    assert setup.toolkit("13.0") == (str(tmp_path / "new"), None)


@pytest.mark.parametrize("cpp, cuda", [("0", True), ("1", True), ("1", False), ("0", False)])
def test_each_extension_is_built_without_the_other(setup, monkeypatch, cpp, cuda):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTMIM_BUILD_CPP", cpp)
    monkeypatch.delenv("FASTMIM_BUILD_CUDA", raising=False)
    monkeypatch.setattr(setup, "cuda", lambda: [Extension("fastmim._CUDA", [])] if cuda else [])
    built = setup.native()
    names = [module.name for module in built.get("ext_modules", [])]
    assert names == ["fastmim._C", "fastmim._PLANS"] * (cpp == "1") + ["fastmim._CUDA"] * cuda
    assert bool(built) == bool(names)


def test_cuda_kernels_that_are_asked_for_are_never_left_out_in_silence(setup, bare, monkeypatch):
    monkeypatch.setenv("FASTMIM_BUILD_CPP", "0")
    monkeypatch.setenv("FASTMIM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTMIM_BUILD_CUDA=1, but no C"):
        setup.native()  # there is no compiler on PATH


def test_architectures_that_the_kernels_are_not_written_for_are_left_out(setup, capsys):
    assert setup.architectures(setup.ARCHITECTURES) == "8.0;9.0a;10.0+PTX"
    assert not capsys.readouterr().err
    assert setup.architectures("7.0 7.5+PTX 8.6;9.0a; 12.0+PTX") == "8.6;9.0a;12.0+PTX"
    assert "no CUDA C++ kernels for 7.0, 7.5+PTX: they need 8.0" in capsys.readouterr().err
    assert setup.architectures("7.5") == ""
    assert setup.architectures("native") == "native"


def test_default_architectures_are_known_to_torch(setup, monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setup.ARCHITECTURES)
    targets = [re.findall(r"(?:sm|compute)_\w+$", flag)[0] for flag in _get_cuda_arch_flags()]
    assert sorted(targets) == ["compute_100", "sm_100", "sm_80", "sm_90a"]


def test_the_extension_is_of_every_source(setup, monkeypatch):
    """Pretend to have nvcc and a CUDA build of torch."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTMIM_BUILD_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;9.0a")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup, "toolkit", lambda version: ("/toolkit", None))
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    (module,) = setup.cuda()
    assert {Path(source).name for source in module.sources} == {
        path.name for path in CUDA.iterdir() if path.suffix in (".cu", ".cpp")
    }
    assert '-DFASTMIM_CUDA_ARCHITECTURES="9.0a"' in module.extra_compile_args["cxx"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert "-l:libcudart.so.13" in module.extra_link_args


def included(path: Path) -> set[str]:
    """Return what `path` includes, directly or not: paths of files in csrc, names of all others."""
    names = set()
    for name in re.findall(r'^\s*#include [<"](.*?)[>"]', path.read_text(), re.MULTILINE):
        here = (path.parent / name).resolve()
        names |= {str(here), *included(here)} if here.exists() else {name}
    return names


@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_are_compiled_without_torch(source):
    names = included(source)
    assert str(CUDA / "kernels.h") in names
    outside = {name for name in names if not Path(name).is_absolute()}
    allowed = {"cuda_runtime.h", "host/device.h"}
    assert all(name in allowed or re.fullmatch(r"[a-z_]+", name) for name in outside), outside


@pytest.mark.skipif(_backends.cuda_build is None, reason=f"no CUDA C++ kernels: {_backends.missing.get('cuda')}")
def test_what_was_built_is_registered_and_serves_cuda_tensors_alone():
    assert torch.ops.fastmim_cuda.attention_qkvpacked.default._schema.name == "fastmim_cuda::attention_qkvpacked"
    assert "attention_qkvpacked" in _backends.cuda_ops
    images, ids = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(kernels.Unserved, match=r"^float64 is served by the reference"):
        torch.ops.fastmim_cuda.gather_patches(images, ids, [4, 4], None, None, torch.float64)
    assert info.collect()["cuda build"]["architectures"]
    for device in ("cpu", "meta"):
        qkv = torch.zeros(1, 3, 3, 2, 64, dtype=torch.bfloat16, device=device)
        with pytest.raises(RuntimeError, match=f"serve CUDA tensors, got one on {device}"):
            torch.ops.fastmim_cuda.attention_qkvpacked(qkv, None, 1.0)


def built(tmp_path: Path, **environment: str) -> tuple[int, list[str]]:
    """Return the exit status and the lines of a build of the extensions into `tmp_path`."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch")
def test_kernels_that_are_asked_for_and_can_not_be_built_are_one_line(tmp_path):
    code, lines = built(tmp_path, FASTMIM_BUILD_CUDA="1")
    assert code and lines[-1] == "fastmim: FASTMIM_BUILD_CUDA=1, but this torch is a CPU build"


def test_a_compiler_that_fails_ends_in_one_line(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*|*-v*|*-dump*) exec c++ "$@";; esac\nexit 1\n')
    broken.chmod(0o755)
    code, lines = built(tmp_path, FASTMIM_BUILD_CUDA="0", CXX=str(broken), CC=str(broken))
    assert code and lines[-1].startswith("fastmim: compiling csrc/ failed (") and "FASTMIM_BUILD_CPP=0" in lines[-1]
