"""Decoding regions of JPEGs is tried in a child process, and whole images are decoded where that fails."""

import json
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_loader import load

from fastmim import info
from fastmim.data import loader, regions
from fastmim.data.dali import Dali
from fastmim.data.regions import Answer, probe

CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and a card."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    asked = regions.usable
    asked.cache_clear()
    yield tmp_path / "cache" / "fastmim"
    asked.cache_clear()


@pytest.fixture
def children(monkeypatch):
    """Children run this code in place of their own; counted."""
    started = []

    def use(code):
        def instead(*args, **kwargs):
            started.append(code)
            return probe(code, 2.0)

        monkeypatch.setattr(regions, "probe", instead)
        return started

    return use


def usable():
    """The answer of a process that has just started."""
    regions.usable.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answer = regions.usable(torch.device("cuda", 0))
    assert bool(said) is not answer
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
def test_a_child_that_fails_is_believed_once_for_all(code, reason, children):
    started = children(code)
    begun = time.monotonic()
    assert not usable() and not usable()
    assert len(started) == 1 and time.monotonic() - begun < 30
    (told,) = regions.remembered().items()
    assert told[0].startswith(f"{CARD}, driver ") and "whole images are decoded" in told[1] and reason in told[1]


def test_a_child_that_succeeds_is_believed_once_for_all(children):
    started = children(RIGHT)
    assert usable() and usable() and len(started) == 1
    assert list(regions.remembered().values()) == ["used"]


@pytest.mark.parametrize("code", ["import os; os.abort()", "raise MemoryError", "import time; time.sleep(60)"])
def test_a_child_that_decodes_nothing_says_nothing_of_regions(code, children):
    started = children(code)
    assert not usable() and not usable()
    assert len(started) == 2 and not regions.remembered()


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
    assert not regions.remembered()
    assert usable() and usable() and len(started) == 2
    assert [file.name for file in cache.iterdir()] == [path.name]


def test_what_libraries_print_is_no_answer(children):
    children("print('whole regions are decoded'); import os; os.abort()")
    assert not usable() and not regions.remembered()


def test_of_two_installations_the_imported_one_is_named(tmp_path, monkeypatch):
    for version in ("2.0", "1.0"):
        folder = tmp_path / version / f"nvidia_dali_cuda130-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: nvidia-dali-cuda130\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(folder.parent))
    assert regions._versions()["nvidia-dali-cuda130"] == "1.0"


def test_without_temporary_files_regions_are_not_probed(monkeypatch):
    def full():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(regions.tempfile, "TemporaryFile", full)
    answer = probe("print('fastmim:regions')")
    assert answer == Answer(False, "no process to try it in: No usable temporary directory found", lasting=False)


def test_an_answer_that_cant_be_moved_leaves_nothing(children, cache, monkeypatch):
    def refused(source, target):
        raise PermissionError(target)

    monkeypatch.setattr(regions.os, "replace", refused)
    children(CRASH)
    assert not usable() and not list(cache.iterdir())


def test_a_cache_that_cant_be_written_is_no_error(children, cache):
    cache.parent.write_text("a file where the folder would be")
    started = children(CRASH)
    assert not usable() and not usable() and len(started) == 2
    assert regions.remembered() == {}


def test_without_a_home_nothing_is_remembered(children, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    started = children(RIGHT)
    assert usable() and usable() and len(started) == 2
    assert regions.remembered() == {}


def test_the_child_on_a_cpu():
    """Its own code, with DALI on the CPU: regions and whole images have Pillow's pixels."""
    answer = probe(regions.CHILD.format(path=sys.path, device="cpu"))
    assert answer == Answer(True), answer


@pytest.mark.parametrize("wrong", ["shifted", "nothing"])
def test_the_child_looks_at_pixels(wrong, monkeypatch):
    decode = Dali._decode

    def other(self, jobs):
        found = decode(self, jobs)
        return [None, *found[1:]] if wrong == "nothing" else found[1:] + found[:1]

    monkeypatch.setattr(Dali, "_decode", other)
    with pytest.raises(RuntimeError, match="no pixels" if wrong == "nothing" else "grey levels off"):
        regions.check(torch.device("cpu"), regions=True)


@pytest.mark.parametrize("repeats", [1, 2])
def test_whole_images_give_the_pixels_of_pillow(photographs, repeats, monkeypatch):
    options = dict(repeats=repeats, drop_last=False)
    expected = [batch.images for batch in load(photographs, backend="pillow", **options)]
    monkeypatch.setattr(loader, "make", lambda _, crops, device, threads: Dali(crops, device, threads, regions=False))
    found = [batch.images for batch in load(photographs, backend="dali", **options)]
    assert len(found) == len(expected)
    assert all(int((a.int() - b.int()).abs().max()) <= 1 for a, b in zip(found, expected))


@pytest.mark.parametrize("answer", [True, False])
def test_a_loader_on_a_gpu_asks_first(answer, monkeypatch):
    from fastmim.data import decoders
    from fastmim.data.crops import Crops

    monkeypatch.setattr(decoders, "link_to", lambda device: "a link")
    monkeypatch.setattr(regions, "usable", lambda device: answer)
    crops = Crops((8, 8), (0.2, 1.0), (3 / 4, 4 / 3), True, 1)
    decoder = decoders.make("dali", crops, torch.device("cuda", 0), 1)
    assert decoder.regions is answer
    decoder._pool.shutdown()


def test_info_tells_what_is_remembered_and_starts_no_cuda(children, capsys, monkeypatch):
    info.main([])
    assert "regions    DALI's decoding of regions of JPEGs: not probed yet" in capsys.readouterr().out
    children(CRASH)
    assert not usable()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("CUDA was started"))
    info.main([])
    said = capsys.readouterr().out
    assert f"regions    {CARD}, driver " in said and "whole images are decoded: decoding regions failed" in said
    info.main(["--json"])
    assert CARD in "".join(json.loads(capsys.readouterr().out)["regions"])
