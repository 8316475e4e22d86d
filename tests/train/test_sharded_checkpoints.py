"""Checkpoints of sharded models: each process writes its part, any number of them reads it, and none is half taken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cases import TEST_ALL
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import SETTINGS, curve, outcome
from test_processes import near
from test_saved import flip

import fastmim
from fastmim import cli
from fastmim.train.checkpoint import store
from fastmim.train.load_run import load_model
from fastmim.train.status import read_status

SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
CHANGES = {"parallel": "fsdp", "dtype": "float64", "ema": 0.5, "batch_size": 6, "keep_last": 9}


@pytest.fixture(scope="module")
def launch(photos, processes):
    """Return a function that runs a config in some processes; it returns their exit statuses and their output."""

    def launch(folder: Path, world: int, hook: str = "", at: int = 0, log=None, **changes) -> tuple[list[int], str]:
        config = {"data": str(photos), "output_dir": str(folder), **SETTINGS, **CHANGES, **changes}
        return processes(config, world, log or folder.with_suffix(".log"), hook, at)

    return launch


def succeed(results: tuple[list[int], str]) -> str:
    statuses, output = results
    assert not any(statuses), (statuses, output[-4000:])
    return output


@pytest.fixture(scope="module")
def straight(one_thread, launch, tmp_path_factory):
    """Return the folder of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    assert "Warning" not in succeed(launch(folder, 2))
    return folder


@pytest.fixture(scope="module")
def stopped(launch, tmp_path_factory):
    """Return the folder of a run of two processes that was interrupted after step 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    statuses, output = launch(folder, 2, "interrupted", 6)
    assert statuses == [143, 143] and "step 6 is saved" in output
    return folder


def copied(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a run that has not finished."""
    shutil.copytree(folder, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "final", ignore_errors=True)
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_each_process_writes_its_part(stopped):
    for path in (stopped / "checkpoints").glob("step-*"):
        assert sorted(file.name for file in path.iterdir()) == ["manifest.json", *SHARDS, "state.json"]
        store.verify(path)
    # the save of step 4 was slow, and was waited for
    assert names(stopped) == ["latest", "step-00000000", "step-00000004", "step-00000006"]
    weight = "optimizer/exp_avg/blocks.0.attn.qkv.weight"
    for name in SHARDS:
        with safe_open(stopped / "checkpoints" / "latest" / name, "pt") as file:
            assert file.get_slice(weight).get_shape() == [24, 16]
    sizes = [(stopped / "checkpoints" / "latest" / name).stat().st_size for name in SHARDS]
    assert max(sizes) < 1.3 * min(sizes)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(launch, straight, stopped, tmp_path):
    folder = copied(stopped, tmp_path)
    output = succeed(launch(folder, 2))
    assert "going on from step 6; 0 logged steps are repeated" in output
    assert outcome(folder) == outcome(straight)
    assert (folder / "final" / "ema.safetensors").read_bytes() == (straight / "final" / "ema.safetensors").read_bytes()


WORLDS = [(2, "fsdp", 1, "fsdp"), (1, "fsdp", 2, "fsdp"), (2, "fsdp", 3, "fsdp")]
if TEST_ALL:
    WORLDS += [
        (2, "fsdp", 2, "ddp"),
        (2, "ddp", 2, "fsdp"),
        (3, "fsdp", 2, "fsdp"),
        (3, "fsdp", 1, "ddp"),
        (6, "fsdp", 2, "fsdp"),
    ]


@pytest.mark.parametrize("before, parallel, after, then", WORLDS)
def test_any_number_of_processes_goes_on(launch, straight, stopped, tmp_path, before, parallel, after, then):
    if (before, parallel) == (2, "fsdp"):
        folder = copied(stopped, tmp_path)
    else:
        folder = tmp_path / "run"
        launch(folder, before, "interrupted", 6, parallel=parallel)
    output = succeed(launch(folder, after, parallel=then))
    assert "going on from step 6; 0 logged steps are repeated" in output
    assert near(curve(folder), curve(straight))
    for name in ("model", "ema"):
        ours, theirs = (load_file(run / "final" / f"{name}.safetensors") for run in (folder, straight))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] - theirs[key]).abs().max() < 1e-9 for key in ours)


@pytest.mark.skipif(not TEST_ALL, reason="four runs: make test-all")
def test_an_average_may_begin_on_the_way(launch, stopped, tmp_path):
    """Continue a run without an average with one: it starts from the weights, in either form."""
    averages = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        launch(folder, 2, "interrupted", 6, ema=None)
        output = succeed(launch(folder, world))
        assert "ema was None, is 0.5" in output
        averages.append(load_file(folder / "final" / "ema.safetensors"))
    assert all((averages[0][key] - averages[1][key]).abs().max() < 1e-9 for key in averages[0])


@pytest.mark.parametrize("name", SHARDS if TEST_ALL else SHARDS[1:])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_used(launch, straight, tmp_path, name):
    folder = copied(straight, tmp_path)
    flip(folder / "checkpoints" / "step-00000012" / name)
    output = succeed(launch(folder, 2))
    assert "checkpoint refused" in output and f"step-00000012/{name}" in output
    assert "going on from step 8; 4 logged steps are repeated" in output
    assert outcome(folder) == outcome(straight)
    assert (folder / "checkpoints" / "step-00000012.damaged").is_dir()


def test_a_manifest_that_lists_too_few_shards_is_refused(straight, tmp_path):
    path = copied(straight, tmp_path) / "checkpoints" / "step-00000012"
    listed = json.loads((path / "manifest.json").read_text())
    del listed["files"][SHARDS[1]]
    (path / "manifest.json").write_text(json.dumps(listed))
    (path / SHARDS[1]).unlink()
    with pytest.raises(store.Damaged, match="lists 1 of 2 shards"):
        store.verify(path)
    with pytest.raises(ValueError, match="must hold 2 shards, has 1"):
        fastmim.load(path)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_full_disk_of_one_process_leaves_out_a_checkpoint(launch, straight, tmp_path):
    folder = tmp_path / "run"
    output = succeed(launch(folder, 2, "full", 8))
    lines = [line for line in output.splitlines() if "No space left" in line]
    assert len(lines) == 1
    assert f"process 1 on {os.uname().nodename}: No space left on device: " in lines[0] and SHARDS[1] in lines[0]
    assert "training goes on" in lines[0]
    assert names(folder) == ["latest", "step-00000000", "step-00000004", "step-00000012"]
    assert outcome(folder) == outcome(straight)


FAILURES = [("both fail", "Read-only file system"), ("broken", "Input/output error")]


@pytest.mark.parametrize("hook, message", FAILURES if TEST_ALL else FAILURES[:1])
def test_a_process_that_can_not_write_stops_the_run_in_one_line(launch, straight, tmp_path, hook, message):
    folder = tmp_path / "run"
    statuses, output = launch(folder, 2, hook, 4)
    assert statuses == [1, 1] and "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("fastmim: [Errno"))
    assert "process 1 on" in line and message in line
    assert line.endswith("the same command goes on from the last checkpoint")
    assert names(folder) == ["latest", "step-00000000"]
    assert "going on from step 0; 8 logged steps" in succeed(launch(folder, 2))
    assert outcome(folder) == outcome(straight)


@pytest.mark.skipif(not TEST_ALL, reason="two runs: make test-all")
@pytest.mark.parametrize("hook", ["full", "broken"])
def test_the_last_one_must_be_written(launch, tmp_path, hook):
    statuses, output = launch(tmp_path / "run", 2, hook, 12)
    assert statuses == [1, 1] and output.count("fastmim: [Errno") == 1
    assert not (tmp_path / "run" / "final").exists()
    assert "step-00000012" not in names(tmp_path / "run")


@pytest.mark.parametrize("hook", ["killed", "killed after writing", *(["first killed"] if TEST_ALL else [])])
def test_processes_killed_in_a_save_leave_the_checkpoint_before(launch, straight, tmp_path, hook):
    folder = tmp_path / "run"
    statuses, _ = launch(folder, 2, hook, 8)
    assert -9 in statuses and all(statuses)
    assert names(folder)[:2] == ["latest", "step-00000000"] and "step-00000008" not in names(folder)
    output = succeed(launch(folder, 2))
    assert "going on from step 4;" in output and "refused" not in output
    assert outcome(folder) == outcome(straight)
    assert not [name for name in names(folder) if name.endswith((".tmp", ".old", ".damaged"))]


def test_folders_that_machines_do_not_share_are_refused(launch, tmp_path):
    statuses, output = launch(Path("run"), 2, "unshared", str(tmp_path), log=tmp_path / "log")
    assert statuses == [1, 1]
    assert "output_dir must be on a file system that all machines share: run of process 0 on" in output


def test_a_shard_that_the_first_process_does_not_see_is_an_error(launch, tmp_path):
    statuses, output = launch(tmp_path / "run", 2, "vanishing", 4)
    assert statuses == [1, 1]
    assert "output_dir must be on a file system that all machines share (a process on" in output
    assert names(tmp_path / "run") == ["latest", "step-00000000"]


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_a_single_process_reads_the_model(straight, tmp_path):
    folder = copied(straight, tmp_path)
    path = folder / "checkpoints" / "step-00000012"
    final = load_file(straight / "final" / "model.safetensors")
    for model in (load_model(folder), load_model(path), fastmim.load(path, num_heads=2, decoder_num_heads=2)):
        found = model.state_dict()
        assert found.keys() == final.keys() and all(torch.equal(found[name], final[name]) for name in final)
    average = load_model(folder, ema=True).state_dict()
    for name, value in load_file(straight / "final" / "ema.safetensors").items():
        assert torch.equal(average[name], value) and (name == "pos_embed" or not torch.equal(value, final[name]))
    assert read_status(folder).checkpoint == 12


def test_commands_read_it(straight, photos, tmp_path, capsys):
    folder = copied(straight, tmp_path)
    classes = tmp_path / "classes"
    for index, picture in enumerate(sorted(photos.iterdir())):
        place = classes / str(index % 2) / picture.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    picture = str(next(photos.glob("*.png")))
    for arguments in (
        ["status", str(folder)],
        ["evaluate", str(folder), str(classes)],
        ["export", str(folder), "--to", "facebook", str(tmp_path / "out.pth")],
        ["reconstruct", str(folder / "checkpoints" / "latest"), picture, "-o", str(tmp_path / "grid.png")],
    ):
        assert cli.main(arguments) == 0, capsys.readouterr()
    assert "step 12" in capsys.readouterr().out
    assert (tmp_path / "grid.png").exists() and (tmp_path / "out.pth").exists()
