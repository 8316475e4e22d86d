"""Clips in two processes (gloo): the samples, masks and results of one process, and of a run that was interrupted."""

import json

from safetensors.torch import load_file
from small_run import curve, outcome
from test_processes import near
from test_shipped import tiny

# eight videos are two updates an epoch
STEPS, STOPPED = 6, 3


def taken(folder) -> dict[tuple[int, int], list[list[int]]]:
    """Return the masks of a run's records, kept and predicted patches, by epoch and sample."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    for path in folder.iterdir():
        for step, line in enumerate(path.read_text().splitlines()):
            for sample, *ids in zip(*json.loads(line)):
                assert found.setdefault((step // 2, sample), ids) is ids, "a sample once an epoch"
    return found


def test_clips_in_two_processes(videos, processes, tmp_path):
    def run(name: str, world: int, record: str, stop: int | None = None) -> str:
        config = tiny(
            "videomae_base_k400", videos, tmp_path / name, f"max_steps={STEPS}", "dtype=float64", "base_lr=0.05"
        )
        (tmp_path / record).mkdir()
        statuses, output = processes(
            config.to_dict(), world, tmp_path / f"{record}.log", "recorded", [str(tmp_path / record), stop]
        )
        assert statuses == [143 if stop else 0] * world, output[-4000:]
        return output

    run("alone", 1, "of one")
    run("both", 2, "of two")
    assert f"step {STOPPED} is saved" in run("broken", 2, "begun", STOPPED)
    # in the middle of an epoch
    assert f"going on from step {STOPPED}" in run("broken", 2, "ended")

    masks = taken(tmp_path / "of one")
    assert sorted(masks) == [(epoch, sample) for epoch in range(STEPS // 2) for sample in range(8)]
    assert taken(tmp_path / "of two") == masks
    parts = [(tmp_path / part / f"{rank}.jsonl").read_text() for rank in (0, 1) for part in ("begun", "ended")]
    whole = [(tmp_path / "of two" / f"{rank}.jsonl").read_text() for rank in (0, 1)]
    assert [parts[0] + parts[1], parts[2] + parts[3]] == whole

    assert outcome(tmp_path / "broken") == outcome(tmp_path / "both")
    assert near(curve(tmp_path / "both"), curve(tmp_path / "alone"))
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("both", "alone"))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-9 for name in theirs) and ours.keys() == theirs.keys()
