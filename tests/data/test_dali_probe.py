"""Probe of DALI's decoding of regions in a child process, and decoding of whole images where it fails."""

import json
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_loader import load

from fastmim import info
from fastmim.data import dali_probe, loader
from fastmim.data.dali import Dali
from fastmim.data.dali_probe import Answer, probe

CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give the test an empty cache folder and a pretended GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    cached = dali_probe.can_decode_regions
    cached.cache_clear()
    yield tmp_path / "cache" / "fastmim"
    cached.cache_clear()


@pytest.fixture
def children(monkeypatch):
    """Return a function that replaces the code of child processes and returns the list of those started."""
    started = []

    def use(code):
        def instead(*args, **kwargs):
            started.append(code)
            return probe(code, 2.0)

        monkeypatch.setattr(dali_probe, "probe", instead)
        return started

    return use


def usable():
    """Return the result of a process that has just started."""
    dali_probe.can_decode_regions.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        answer = dali_probe.can_decode_regions(torch.device("cuda", 0))
    assert bool(warned) is not answer
    return answer


RIGHT = "print('fastmim:whole'); print('fastmim:regions')"
CRASH = "import os, signal; print('fastmim:whole', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; print('fastmim:whole', flush=True); time.sleep(60)"
WRONG = "print('fastmim:whole', flush=True); raise RuntimeError('pixels of a crop are 91.0 grey levels off')"


@pytest.mark.parametrize(
    ("code", "reason"),
    [(CRASH, "ended by SIGSEGV"), (HANG, "still busy after 2 s"), (WRONG, "are 91.0 grey levels off")],
    ids=["crash", "hang", "wrong"],
)
def test_a_failure_is_stored(code, reason, children):
    started = children(code)
    begun = time.monotonic()
    assert not usable() and not usable()
    assert len(started) == 1 and time.monotonic() - begun < 30
    ((key, result),) = dali_probe.stored().items()
    assert key.startswith(f"{CARD}, driver ") and "whole images are decoded" in result and reason in result


def test_a_success_is_stored(children):
    started = children(RIGHT)
    assert usable() and usable() and len(started) == 1
    assert list(dali_probe.stored().values()) == ["used"]


@pytest.mark.parametrize("code", ["import os; os.abort()", "raise MemoryError", "import time; time.sleep(60)"])
def test_a_child_that_decodes_nothing_is_tried_again(code, children):
    started = children(code)
    assert not usable() and not usable()
    assert len(started) == 2 and not dali_probe.stored()


@pytest.mark.parametrize("other", ["fastmim", "nvidia-nvimgcodec-cu13", "card", "driver"])
def test_another_version_card_or_driver_is_probed_anew(other, children, cache):
    started = children(RIGHT)
    assert usable()
    (path,) = cache.iterdir()
    found = json.loads(path.read_text())
    assert other in found["key"]
    found["key"][other] = "another"
    path.write_text(json.dumps(found))
    assert usable() and len(started) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', "\udcff", '{"key": {}, "usable": 0}', "[" * 10**5])
def test_an_unreadable_answer_is_replaced(text, children, cache):
    started = children(RIGHT)
    assert usable()
    (path,) = cache.iterdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert not dali_probe.stored()
    assert usable() and usable() and len(started) == 2
    assert [file.name for file in cache.iterdir()] == [path.name]


def test_output_of_libraries_is_ignored(children):
    children("print('whole regions are decoded'); import os; os.abort()")
    assert not usable() and not dali_probe.stored()


def test_of_two_installations_the_imported_one_is_named(tmp_path, monkeypatch):
    for version in ("2.0", "1.0"):
        folder = tmp_path / version / f"nvidia_dali_cuda130-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: nvidia-dali-cuda130\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(folder.parent))
    assert dali_probe._versions()["nvidia-dali-cuda130"] == "1.0"


def test_without_temporary_files_regions_are_not_probed(monkeypatch):
    def full():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(dali_probe.tempfile, "TemporaryFile", full)
    answer = probe("print('fastmim:regions')")
    assert answer == Answer(
        False, "the child process can't be started: No usable temporary directory found", lasting=False
    )


def test_an_answer_that_cant_be_moved_leaves_nothing(children, cache, monkeypatch):
    def refused(source, target):
        raise PermissionError(target)

    monkeypatch.setattr(dali_probe.os, "replace", refused)
    children(CRASH)
    assert not usable() and not list(cache.iterdir())


def test_a_cache_that_cant_be_written_is_no_error(children, cache):
    cache.parent.write_text("a file where the folder would be")
    started = children(CRASH)
    assert not usable() and not usable() and len(started) == 2
    assert dali_probe.stored() == {}


def test_without_a_home_nothing_is_stored(children, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    started = children(RIGHT)
    assert usable() and usable() and len(started) == 2
    assert dali_probe.stored() == {}


def test_the_child_on_a_cpu(monkeypatch):
    """Real code of the child, with DALI on the CPU: regions and whole images have Pillow's pixels."""
    # Python ignores entries of sys.path that are not strings
    monkeypatch.setattr(sys, "path", [*sys.path, Path("nowhere")])
    answer = probe(dali_probe.child_code(torch.device("cpu")))
    assert answer == Answer(True), answer


@pytest.mark.parametrize("wrong", ["shifted", "nothing"])
def test_the_child_compares_pixels(wrong, monkeypatch):
    decode = Dali._decode

    def other(self, jobs):
        found = decode(self, jobs)
        return [None, *found[1:]] if wrong == "nothing" else found[1:] + found[:1]

    monkeypatch.setattr(Dali, "_decode", other)
    with pytest.raises(RuntimeError, match="no pixels" if wrong == "nothing" else "grey levels off"):
        dali_probe.check(torch.device("cpu"), regions=True)


@pytest.mark.parametrize("repeats", [1, 2])
def test_whole_images_give_the_pixels_of_pillow(photographs, repeats, monkeypatch):
    options = dict(repeats=repeats, drop_last=False)
    expected = [batch.images for batch in load(photographs, backend="pillow", **options)]
    monkeypatch.setattr(loader, "make", lambda _, crops, device, threads: Dali(crops, device, threads, regions=False))
    found = [batch.images for batch in load(photographs, backend="dali", **options)]
    assert len(found) == len(expected)
    assert all(int((a.int() - b.int()).abs().max()) <= 1 for a, b in zip(found, expected))


@pytest.mark.parametrize("answer", [True, False])
def test_a_loader_on_a_gpu_uses_the_probe(answer, monkeypatch):
    from fastmim.data import decoders
    from fastmim.data.crops import Crops

    monkeypatch.setattr(decoders, "link_to", lambda device: "a link")
    monkeypatch.setattr(dali_probe, "can_decode_regions", lambda device: answer)
    crops = Crops((8, 8), (0.2, 1.0), (3 / 4, 4 / 3), True, 1)
    decoder = decoders.make("dali", crops, torch.device("cuda", 0), 1)
    assert decoder.regions is answer
    decoder._pool.shutdown()


def test_info_prints_the_stored_result_and_starts_no_cuda(children, capsys, monkeypatch):
    info.main([])
    assert "regions    DALI's decoding of regions of JPEGs: not probed yet" in capsys.readouterr().out
    children(CRASH)
    assert not usable()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("CUDA was started"))
    info.main([])
    output = capsys.readouterr().out
    assert f"regions    {CARD}, driver " in output and "whole images are decoded: decoding regions failed" in output
    info.main(["--json"])
    assert CARD in "".join(json.loads(capsys.readouterr().out)["regions"])
