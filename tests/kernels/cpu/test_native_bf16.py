"""Products of AVX512-BF16: executed on AVX-512 with the instruction emulated, and the machine code that is shipped."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TEST_ALL

from fastmim import _backends

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "bf16-emulated"
COMPILER = os.environ.get("CXX", "c++").split()[0]
# with what is installed beside the interpreter, where an environment that is not activated has its ninja
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

# Builds attention with the emulated instruction and registers it, in a process that has no other compiled kernels.
LOAD = """
import fcntl, sys
from pathlib import Path
import torch.utils.cpp_extension
import fastmim, setup
folder, build = Path("csrc/cpu"), Path(sys.argv.pop(1))
sources = [folder / "attention.cpp", folder / "kernels.cpp", *folder.glob("isa_*.cpp")]
build.mkdir(parents=True, exist_ok=True)
with open(build / "ours", "w") as ours:
    fcntl.flock(ours, fcntl.LOCK_EX)
    # what a build that was killed leaves behind, and the next one would wait for
    (build / "lock").unlink(missing_ok=True)
    flags = [*setup.FLAGS, "-DFASTMIM_EMULATE_BF16"]
    torch.utils.cpp_extension.load(
        "bf16_emulated", sorted(map(str, sources)), flags, build_directory=str(build), is_python_module=False
    )
"""

SUITE = """
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "tests/ops/test_attention.py", *sys.argv[1:]]))
"""

# the sum of every result's bits, for each dtype
DIGEST = """
from fastmim import ops
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    qkv = torch.randn(2, 70, 3, 2, 33).to(dtype).requires_grad_()
    out = ops.attention_qkvpacked(qkv)
    out.backward(torch.randn(out.shape).to(dtype))
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    print(*(x.detach().contiguous().view(bits).long().sum().item() for x in (out, qkv.grad)))
"""


def why_not() -> str | None:
    """Return why the emulated instruction can't be compiled or executed here; None where it can."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no processor with AVX-512"
    if not shutil.which(COMPILER):
        return f"no C++ compiler ({COMPILER}) on PATH"
    if "clang" in subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout:
        return "clang does not build these kernels"
    return None if shutil.which("ninja", path=PATH) else "no ninja"


reason = why_not()
emulated = pytest.mark.skipif(reason is not None, reason=reason or "")


def run(code: str, *args: str, isa: str) -> str:
    """Return the output of a command that the emulated kernels serve."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTMIM_TEST_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append('')\n{LOAD}{code}", str(BUILD), *args],
        cwd=ROOT,
        env={**inherited, "PATH": PATH, "FASTMIM_KERNELS": "reference", "FASTMIM_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@emulated
def test_attention_is_right_by_pairs_of_bf16():
    """The suite of attention, in FASTMIM_TEST_ALL that of bf16; what is compiled from the op comes to the same call."""
    output = run(SUITE, "-k", "bfloat16 or fuzz" if TEST_ALL else "not compile", isa="avx512_bf16")
    assert int(re.search(r"(\d+) passed", output)[1]) >= 50


@emulated
def test_other_dtypes_are_left_to_avx512():
    by_pairs, by_floats = (run(DIGEST, isa=isa).splitlines() for isa in ("avx512_bf16", "avx512"))
    assert by_pairs[:2] == by_floats[:2] and by_pairs[2] != by_floats[2]


@pytest.mark.skipif(_backends.build is None, reason=f"no compiled kernels: {_backends.missing.get('cpp')}")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 processor")
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_the_instruction_is_in_its_set_alone():
    if "clang" in _backends.build["compiler"].lower():
        pytest.skip("clang does not build these kernels")
    from fastmim import _C

    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True).stdout
    assert "vfmadd" in code
    functions = re.split(r"^[0-9a-f]+ <(.*)>:$", code, flags=re.MULTILINE)[1:]
    holders = [name for name, body in zip(functions[::2], functions[1::2]) if "vdpbf16ps" in body]
    assert holders and all("avx512_bf16" in name for name in holders)
