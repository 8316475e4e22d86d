"""The CUDA C++ kernels compile without spills, within their registers, to the instructions that are meant."""

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cases import TEST_ALL

SOURCES = sorted((Path(__file__).parents[3] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100") if TEST_ALL else ("90a",)
REGISTERS = 65536  # of a multiprocessor
# kernel -> instructions that each of its instances must have
MEANT = {
    "attention_kernel": ("HMMA", "LDSM", "LDGSTS.E.BYPASS.128", "STG.E.128"),
    "attention_backward_kernel": ("HMMA", "LDSM", "LDGSTS.E.BYPASS.128", "STG.E.128"),
}
# kernels without a division of 64 bits, which takes about seventy instructions
WITHOUT_WIDE_DIVISIONS = "attention_kernel", "attention_backward_kernel"
# kernels whose scores are rounded before they, or a maximum of them, take part in a sum
WITH_ROUNDED_SCORES = "attention_kernel", "attention_backward_kernel"
# of the instances that read 16 bytes at a time: planes (1) and interleaved (2) of reader.h, wide rows
WIDE = re.compile(r"(gather_patches|pixel_loss)_kernel.*LayoutE[12]|(scatter_patches|place_tokens)_kernelILb1")
# kernel -> threads of a block, and blocks that a multiprocessor must be able to hold
OCCUPANCY = {
    "random_masking_kernel": (256, 4),
    "gather_patches_kernel": (256, 2),
    "scatter_patches_kernel": (256, 4),
    "place_tokens_kernel": (256, 4),
    "pixel_loss_kernel": (128, 4),
    "cosine_loss_kernel": (128, 4),
    "attention_kernel": (128, 3),
}


def disassembler() -> str | None:
    """Return cuobjdump, of PATH or of Triton; None where there is none."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


needs_toolkit = pytest.mark.skipif(
    not (shutil.which("nvcc") and disassembler()), reason="no nvcc on PATH, or no cuobjdump there or in Triton"
)


def compiled(source: Path, architecture: str, folder: Path) -> tuple[str, str]:
    """Return the output of ptxas, and the machine code."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    code = subprocess.run([disassembler(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return done.stderr, code


def has_fused_exponents(body: str) -> bool:
    """Return whether the argument of an exponential comes from a fused multiply-add."""
    last = {}
    for name, to, others in re.findall(r"\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]+) (R\d+),?([^;]*);", body):
        if name == "MUFU.EX2" and last.get(re.sub(r"\.reuse|[-| ]", "", others)) == "FFMA":
            return True
        last[to] = name
    return False


def complaints(output: str, code: str) -> list[str]:
    """Return what is wrong with the kernels of one file."""
    found = []
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        output,
        re.DOTALL,
    )
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", code, re.DOTALL))
    for name, stores, loads, registers in entries:
        kernel = next(
            k for k in sorted({*OCCUPANCY, *MEANT}, key=len, reverse=True) if re.search(rf"\d+{k}(?!\w*_kernel)", name)
        )
        if int(stores) or int(loads):
            found.append(f"{name} spills {stores} bytes")
        threads, blocks = OCCUPANCY.get(kernel, (0, 0))
        if not threads:
            # long forms (256 threads) one block, short ones (128) two
            threads, blocks = (256, 1) if "ELb1E" in name else (128, 2)
        # registers are given out eight at a time
        if (int(registers) + 7) // 8 * 8 * threads * blocks > REGISTERS:
            found.append(f"{name} uses {registers} registers: {blocks} blocks of {threads} threads don't fit")
        meant = MEANT.get(kernel, ()) + (("LDG.E.128",) if WIDE.search(name) else ())
        found += [f"{name} has no {word}" for word in meant if word not in bodies[name]]
        if kernel in WITHOUT_WIDE_DIVISIONS and "I2F.U64" in bodies[name]:
            found.append(f"{name} divides 64-bit integers")
        if kernel in WITH_ROUNDED_SCORES and has_fused_exponents(bodies[name]):
            found.append(f"{name} subtracts a maximum from scores that are not rounded")
    return found if entries else ["no kernel was compiled"]


@needs_toolkit
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_as_meant(architecture, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda source: compiled(source, architecture, tmp_path), SOURCES[::-1]))
    found = [line for output, code in results for line in complaints(output, code)]
    assert not found, "\n".join(found)


def test_complaints_are_made():
    output = (
        "Compiling entry function '_Z16attention_kernel'\n8 bytes spill stores, 0 bytes spill loads\nUsed 200 registers"
    )
    body = "HMMA LDSM I2F.U64.RP\n/*0010*/   FFMA R1, R2, R3, -R4 ;\n/*0020*/   @P1 MUFU.EX2 R5, R1 ;"
    found = "\n".join(complaints(output, f"Function : _Z16attention_kernel\n {body}"))
    words = "spills 8", "200 registers", "no LDGSTS", "no STG.E.128", "divides 64-bit", "not rounded"
    assert all(word in found for word in words)
