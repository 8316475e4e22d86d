"""A Triton cache that is filled without a GPU holds the kernels of a flight, and reports those that it lacks."""

import importlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.kernels import loss
from gpu import plans, smoke_cases, triton_cache, triton_fill
from harness import rows


def missing():
    """Return the reason why nothing can be compiled here, or None."""
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set"
    try:
        triton.knobs.nvidia.ptxas  # noqa: B018
    except RuntimeError as error:
        return str(error)
    return None if shutil.which(os.environ.get("CC", "cc")) else "there is no C compiler"


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def chosen(*names):
    return [program for program in triton_fill.programs() if program[0].removeprefix("smoke: ") in names]


SCALED = "scale_gradient_, 147 patches of 768, bfloat16"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "triton.tar.gz"
    found = triton_fill.fill(path, chosen(SCALED), processes=1)
    assert (
        found["kernels"] == found["compiled"] == 1 and found["C modules"] >= 1 and found["bytes"] == path.stat().st_size
    )
    return path


def kernels(misses):
    """Return the kernels that were compiled, without Triton's C modules."""
    return [name for name in misses if name.startswith("fastmim.")]


def test_nothing_is_compiled_that_the_archive_holds(archive):
    seen = triton_fill.check(archive, chosen(SCALED))
    assert sum(seen.hits.values()) == 1 and not kernels(seen.misses)


@pytest.mark.skipif(
    not hasattr(triton_fill.nvidia, "make_launcher"),
    reason="later versions name their C module by the folder of the driver's library, too",
)
def test_modules_load_with_the_driver_alone(archive, tmp_path):
    """Check that modules linked without a driver work with one, and are not compiled again."""
    assert not triton_fill.check(archive, chosen(SCALED)).misses
    triton_cache.unpack(archive, tmp_path)
    for module in tmp_path.glob("*/*.so"):
        linked = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
        assert "Shared library: [libcuda.so.1]" in linked
        module.write_bytes(b"no module")
    triton_cache.pack(tmp_path, tmp_path / "broken.tar.gz", set(os.listdir(tmp_path)))
    seen = triton_fill.check(tmp_path / "broken.tar.gz", chosen(SCALED))
    assert sum(seen.hits.values()) == 1 and "cuda_utils 0" in seen.misses


def test_an_archive_is_brought_up_to_date(archive, tmp_path):
    path = tmp_path / "triton.tar.gz"
    shutil.copy(archive, path)
    other = SCALED.replace("bfloat16", "float32")
    found = triton_fill.fill(path, chosen(SCALED, other), processes=1)
    assert (found["kernels"], found["compiled"]) == (2, 1)
    assert not kernels(triton_fill.check(path, chosen(SCALED, other)).misses)
    # what no program launches is left out
    found = triton_fill.fill(path, chosen(other), processes=1)
    assert (found["kernels"], found["compiled"]) == (1, 0)
    assert len(kernels(triton_fill.check(path, chosen(SCALED)).misses)) == 1


def test_what_the_archive_lacks_is_found(archive):
    seen = triton_fill.check(archive, chosen(SCALED, SCALED.replace("bfloat16", "float32")))
    assert sum(seen.hits.values()) == 1
    (name,) = kernels(seen.misses)
    assert name.startswith("fastmim.kernels.loss._scale_gradient_kernel ")


def test_a_changed_kernel_is_compiled_anew(archive):
    kernel = loss._scale_gradient_kernel
    source = kernel.src
    try:
        kernel._unsafe_update_src(source.replace("factor != 1.0", "factor != 2.0"))
        seen = triton_fill.check(archive, chosen(SCALED))
    finally:
        kernel._unsafe_update_src(source)
    assert not seen.hits and len(kernels(seen.misses)) == 1


def test_a_miss_leaves_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv(rows.FILE, str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    with triton_fill.empty_cache(), triton_fill.without_gpu():
        triton_cache.watch()
        for _, program in chosen(SCALED):
            program()
    (row,) = rows.read(tmp_path / "rows.jsonl").values()
    assert row["stage"] == "cache_miss" and row["kernel"] == "fastmim.kernels.loss._scale_gradient_kernel"
    assert row["signature"][:2] == ["*bf16", "*fp32"] and row["num_warps"] == 8 and row["milliseconds"] > 0


def test_unpacked_groups_name_files_of_the_folder(archive, tmp_path):
    made = triton_cache.unpack(archive, tmp_path)
    assert triton_cache.differences(made) == []
    groups = list(tmp_path.glob("*/__grp__*"))
    assert groups
    for group in groups:
        for name, path in json.loads(group.read_text())["child_paths"].items():
            assert Path(path) == group.parent / name
        assert any((group.parent / name).suffix == ".cubin" for name in os.listdir(group.parent))
    # no entry seems new
    with tarfile.open(archive) as tar:
        newest = max(member.mtime for member in tar)
    assert all(path.stat().st_mtime <= newest for path in tmp_path.glob("*"))


def test_nothing_is_unpacked_outside_the_folder(tmp_path):
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        triton_cache.add(tar, "../outside", b"")
    with pytest.raises(ValueError, match="no entry of a cache"):
        triton_cache.unpack(tmp_path / "bad.tar.gz", tmp_path / "folder")
    assert not (tmp_path / "outside").exists()


def test_an_archive_that_is_cut_short_spoils_no_other(archive, tmp_path, capsys):
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:999])
    with tarfile.open(tmp_path / "single.tar.gz", "w:gz") as tar:
        triton_cache.add(tar, "KEY/kernel.json", b"{}")
    archives = [tmp_path / "cut.tar.gz", tmp_path / "single.tar.gz", archive]
    assert triton_cache.unpack_all(archives, tmp_path / "folder") == 1
    output = capsys.readouterr().out
    assert "cut.tar.gz: not unpacked: " in output and "single.tar.gz" not in output
    assert (tmp_path / "folder" / "KEY" / "kernel.json").is_file() and list(tmp_path.glob("folder/*/*.cubin"))
    assert triton_cache.unpack_all(archives[1:], tmp_path / "folder") == 0


def test_differences_from_the_archive_are_named(archive, tmp_path):
    made = triton_cache.unpack(archive, tmp_path)
    (difference,) = triton_cache.differences({**made, "triton": "3.0.0"})
    assert difference == f"triton is {triton.__version__}, there it was 3.0.0"
    assert triton_cache.differences({**made, "key": "other"}) == [
        "Triton is another build of its version; its entries are used all the same"
    ]


@pytest.mark.parametrize("version, adopted", [(triton.__version__, True), ("3.0.0", False)])
def test_another_build_of_the_same_version_is_adopted(tmp_path, monkeypatch, version, adopted):
    cache = triton.runtime.cache
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    (tmp_path / triton_cache.MADE).write_text(json.dumps({"triton": version, "key": "other"}))
    triton_cache.adopt(tmp_path)
    assert (cache.triton_key() == "other") == adopted


@pytest.mark.parametrize("made", ["ELF", ""])
@pytest.mark.parametrize("here", ["ELF", ""])
def test_c_modules_are_found_with_and_without_the_program_file(tmp_path, monkeypatch, made, here):
    build = triton.runtime.build
    monkeypatch.setattr(triton.runtime.cache, "triton_key", triton.runtime.cache.triton_key)
    monkeypatch.setattr(build, "platform_key", lambda: f"x86_64,Linux,64bit,{here}")
    facts = {"triton": triton.__version__, "key": "k", "platform": f"x86_64,Linux,64bit,{made}"}
    (tmp_path / triton_cache.MADE).write_text(json.dumps(facts))
    triton_cache.adopt(tmp_path)
    assert build.platform_key() == facts["platform"]
    monkeypatch.setattr(build, "platform_key", lambda: "aarch64,Linux,64bit,ELF")
    triton_cache.adopt(tmp_path)
    assert build.platform_key() == "aarch64,Linux,64bit,ELF"


def test_layouts_keep_their_alignment():
    x = torch.randn(4, 6, 8)
    for view in (x, x[1:], x[:, 1:], x[..., 1:], x.transpose(0, 2), x[:0], x.expand(3, 4, 6, 8)):
        same = triton_fill.laid_out(view)
        assert (same.shape, same.stride(), same.dtype) == (view.shape, view.stride(), view.dtype)
        assert same.data_ptr() == view.storage_offset() * 4


class Layouts(TorchDispatchMode):
    """Record the calls of fastmim's ops, each with the layout of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastmim":
            self.calls.append((func._schema.name, [self.layout(arg) for arg in args]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def layout(arg):
        if not isinstance(arg, torch.Tensor):
            return arg
        return arg.shape, arg.stride(), arg.dtype, arg.storage_offset() * arg.element_size() % 16


def test_tensors_without_values_are_laid_out_as_those_with(monkeypatch):
    step = plans.Step("tiny", 32, 4, 0.75, 0.5, ((plans.OURS, plans.EAGER),))
    with triton_fill.without_gpu(), Layouts() as without:
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: True)
        triton_fill.training_step(step)
    monkeypatch.setattr(importlib.import_module("fastmim.nn.narrow"), "emulated", lambda device: False)
    with Layouts() as real:
        triton_fill.training_step(step)
    assert len(real.calls) > 100 and without.calls == real.calls


def test_a_training_step_launches_what_it_launches_on_a_gpu():
    step = plans.Step("tiny", 32, 4, 0.75, 0.5, ((plans.OURS, plans.EAGER),))
    launches = triton_fill.listed([("step", lambda: triton_fill.training_step(step))])
    signatures = {launch.kernel.__name__: launch.signature for launch in launches}
    assert signatures.keys() >= {
        *("_random_masking_kernel", "_gather_kernel", "_place_kernel", "_decoder_kernel", "_pixel_loss_kernel"),
        *("tile_forward_kernel", "tile_backward_kernel", "_scale_gradient_kernel"),
        *(
            "_add_layer_norm_kernel",
            "_add_layer_norm_backward_kernel",
            "_bias_gelu_kernel",
            "_bias_gelu_backward_kernel",
        ),
    }
    # under autocast: narrow branches, a wide stream; the whole images are read as bytes
    assert signatures["tile_forward_kernel"]["q"] == "*bf16"
    assert signatures["_add_layer_norm_kernel"]["residual"] == "*fp32"
    assert signatures["_pixel_loss_kernel"]["images"] == "*u8"


def test_every_program_that_flies_is_listed():
    names = [name for name, _ in triton_fill.programs()]
    assert len(set(names)) == len(names)
    assert {f"smoke: {case.name}" for case in smoke_cases.cases()} <= set(names)
    for step in (*plans.GPU.steps, plans.GPU.profiled, *plans.GPU.compiled):
        assert f"steps: {step}" in names
