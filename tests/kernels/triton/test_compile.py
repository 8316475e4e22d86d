"""The Triton kernels, compiled for GPUs that are not here, hold what benchmarks/results/compiled.json says of them."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from cases import TEST_ALL

pytest.importorskip("triton")

import compiled
from fastmim import kernels

RECORDED = compiled.RESULTS / "compiled.json"


def identity(row):
    return row["kernel"], tuple(row["shapes"]), row["architecture"]


def complaints(rows, recorded, same_triton):
    """Faults in the rows of a run, by themselves and compared with the recorded rows."""
    found = []
    known = {identity(row): row for row in recorded}
    for row in rows:
        before = known.pop(identity(row), None)
        wrong = []
        if "error" in row:
            wrong.append(f"does not compile: {row['error']}")
        else:
            if row["spill"] > (before["spill"] if row["may_spill"] and before else 0):
                wrong.append(f"spills {row['spill']} bytes")
            if row["shared"] > compiled.ARCHITECTURES[row["architecture"]][0]:
                wrong.append(f"needs {row['shared']} bytes of shared memory")
            if row["dots"] and not row["tensor_cores"]:
                wrong.append("multiplies matrices without tensor cores")
            # other versions of the compiler may order loads otherwise
            if row["wide_loads"] < max(0.5 * row["wide"], before["wide_loads"] - 0.1 if before else 0):
                wrong.append(f"loads only {row['wide_loads']:.0%} of its bytes 128 bits at a time")
        if before is None or (same_triton and row != before):
            wrong.append("is not as in the table: run python benchmarks/compiled.py")
        shapes = "; ".join(row["shapes"])
        found += [f"sm_{row['architecture']} {row['kernel']} ({row['op']}, {shapes}) {words}" for words in wrong]
    return found + [f"sm_{a} {kernel} ({'; '.join(shapes)}) is in the table only" for kernel, shapes, a in known]


def test_kernels_are_what_the_table_says(tmp_path):
    architectures = list(compiled.ARCHITECTURES) if TEST_ALL else [90]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMIM_", "TRITON_INTERPRET"))}
    command = [sys.executable, compiled.__file__, "--json", str(tmp_path / "rows.json"), "--architectures"]
    command += map(str, architectures)
    done = subprocess.run(command, env=environment | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    now, recorded = (json.loads(path.read_text()) for path in (tmp_path / "rows.json", RECORDED))
    expected = [row for row in recorded["rows"] if row["architecture"] in architectures]
    found = complaints(now["rows"], expected, now["triton"] == recorded["triton"])
    assert not found, "\n".join(found)


ROW = dict(
    op="op",
    kernel="kernel",
    shapes=["shape"],
    architecture=80,
    may_spill=False,
    wide=True,
    warps=4,
    registers=64,
    spill=0,
    shared=1024,
    dots=True,
    tensor_cores="mma",
    wide_loads=0.9,
    wide_stores=1.0,
)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(spill=8), "spills 8 bytes"),
        (dict(may_spill=True, spill=8), "spills 8 bytes"),
        (dict(shared=164 * 1024), "needs 167936 bytes of shared memory"),
        (dict(tensor_cores=None), "without tensor cores"),
        (dict(wide_loads=0.7), "loads only 70%"),
        (dict(wide=False, wide_loads=0.3), "loads only 30%"),
        (dict(error="CompilationError: no"), "does not compile: CompilationError"),
        (dict(shapes=["another"]), "is in the table only"),
    ],
)
def test_what_is_worse_than_the_table_is_named(change, words):
    assert not complaints([ROW], [ROW], same_triton=True)
    assert not complaints([ROW | dict(registers=65)], [ROW], same_triton=False)
    assert complaints([ROW | dict(registers=65)], [ROW], same_triton=True)
    assert any(words in line for line in complaints([ROW | change], [ROW], same_triton=False))


def test_every_op_is_compiled_with_arguments_of_its_schema():
    calls = list(compiled.calls())
    assert {call.op for call in calls} == set(itertools.chain(*kernels.OPS.values()))
    for call in calls:
        getattr(torch.ops.fastmim, call.op).default(*call.args)


def test_wide_share_counts_bytes():
    ptx = """
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	ld.global.L1::evict_last.b32 { %r5 }, [ %rd2 + 0 ];
	cp.async.ca.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x4, %r7;
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
	ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r12];
	st.global.b16 [ %rd4 + 0 ], { %rs1 };
	"""
    assert compiled.wide_share(ptx, "ld") == 0.8
    assert compiled.wide_share(ptx, "st") == 0
