"""The loop: the loss curve of the plain PyTorch reference, gradients that aren't finite, and a run's files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from cases import TEST_ALL, Errors, check_draws
from PIL import Image
from plain import Cell, normalise, plain_model
from small_run import curve, outcome
from torch import Tensor

from fastmim import masking
from fastmim.data import ImageLoader
from fastmim.data.seeds import WEYL, _mix, mask_seeds
from fastmim.train import Trainer
from fastmim.train.config import Config, read
from fastmim.train.schedule import adamw, learning_rate


def plain_curve(config: Config, steps: int, data: Path) -> list[float]:
    """Return the losses of benchmarks/rivals/plain_mae.py on the run's data, masks, schedule and first weights."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    torch.manual_seed(config.seed)
    template = config.build()
    model = plain_model(template).to(dtype)
    optimizer = adamw(model, config)
    loader = ImageLoader(
        data,
        config.batch_size,
        image_size=config.image_size,
        scale=config.crop_scale,
        flip=config.flip,
        seed=config.seed,
        backend=config.backend,
    )
    losses: list[float] = []
    while True:
        epoch = loader.epoch
        for batch in loader:
            if len(losses) == steps:
                return losses
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, len(losses), steps)
            seeds = mask_seeds(config.seed, epoch, batch.ids)
            mask = masking.random(len(batch.ids), template.patch_embed.num_patches, config.mask_ratio, seeds=seeds)
            # ranks serve as noise that gives the same mask
            loss = model(normalise(batch.images, dtype), mask.ids_restore.double(), Cell(config.mask_ratio, 1.0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())


def quickstart(folder: Path, *settings: str) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of a run in a dtype, and of the plain model in that dtype and in float64."""
    always = ["log_every=1", "backend=pillow", "reconstruct_every=0", f"output_dir={folder}"]
    config = read("quickstart_cpu", [*always, *settings])
    Trainer(config).run()
    ours, data = [line[1] for line in curve(folder)], folder / "data" / "skimage_photos" / "train"
    plain = {
        dtype: plain_curve(dataclasses.replace(config, dtype=dtype), len(ours), data)
        for dtype in (config.dtype, "float64")
    }
    return torch.tensor(ours, dtype=torch.float64), [torch.tensor(x, dtype=torch.float64) for x in plain.values()]


def test_the_quickstart_is_the_plain_reference(tmp_path):
    """Check that 200 steps (in make test 20) agree to 1e-8 in float64."""
    steps = 200 if TEST_ALL else 20
    ours, [plain] = quickstart(tmp_path, "dtype=float64", "batch_size=16", f"max_steps={steps}")
    assert len(ours) == len(plain) == steps
    assert (ours - plain).abs().max() < 1e-8
    assert ours[-1] < ours[0] - 0.05


def test_the_quickstart_in_float32_is_as_near_to_float64_as_the_plain_reference(tmp_path):
    """Compare the first steps by `check_draws`: rounding errors grow too far in later ones."""
    draws = []
    for seed in range(3):
        settings = f"seed={seed}", "dtype=float32", "batch_size=8", "max_steps=6"
        ours, [plain, exact] = quickstart(tmp_path / str(seed), *settings)
        draws.append(Errors(*((losses - exact).abs().max().item() for losses in (ours, plain)), 0))
    check_draws(draws)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_masks_are_functions_of_seed_epoch_and_sample():
    ids = torch.tensor([5, 0, 2**40, 7])
    seeds = mask_seeds(3, 9, ids)
    assert torch.equal(mask_seeds(3, 9, ids.flip(0)), seeds.flip(0))
    everything = torch.cat([mask_seeds(s, e, torch.arange(500)) for s in range(4) for e in range(5)])
    assert len(everything.unique()) == len(everything)
    # splitmix64's first output of state 0 is known
    assert _mix(torch.tensor([WEYL])).item() == 0xE220A8397B1DCDAF - 2**64


# ---- gradients that aren't finite ------------------------------------------------------------------------------------


def poison(monkeypatch, steps, times=100):
    """Put NaN into the gradients at these steps, the first `times` times that a step is made."""
    norm, trainers = torch.nn.utils.get_total_norm, []
    update, left = Trainer._update, dict.fromkeys(steps, times)

    def watched(self, batch):
        trainers[:] = [self]
        update(self, batch)

    def poisoned(gradients):
        step = trainers[0].step + 1
        if left.get(step):
            left[step] -= 1
            gradients[0].fill_(float("nan"))
        return norm(gradients)

    monkeypatch.setattr(Trainer, "_update", watched)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)


def test_one_is_skipped_counted_and_recorded(config, straight, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, [5, 7])
    Trainer(config(checkpoint_every=6)).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert lines[4]["grad_norm"] is None and lines[4]["loss"] > 0
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["grad_norm"], len(line["ids"])) for line in skipped] == [(5, "nan", 4), (7, "nan", 4)]
    assert "step 5 skipped" in capsys.readouterr().err
    # until then, and in the step itself, nothing changed
    assert curve(tmp_path / "run")[:4] == curve(straight)[:4]
    assert curve(tmp_path / "run")[4][1] == curve(straight)[4][1]
    assert curve(tmp_path / "run")[5][1] != curve(straight)[5][1]


@pytest.mark.fault
def test_several_go_back_and_a_passing_fault_leaves_no_trace(config, straight, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, [6, 7, 8], times=1)
    Trainer(config(max_skipped=3)).run()
    assert "back to the last good checkpoint" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(straight)
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == ""


@pytest.mark.fault
def test_several_again_stop_the_run(config, tmp_path, monkeypatch):
    poison(monkeypatch, [6, 7, 8])
    with pytest.raises(RuntimeError, match=r"in 3 steps in a row, up to step 8, again after going back: stopped"):
        Trainer(config(max_skipped=3, log_every=5)).run()
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step-00000004"
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6, 7, 8]
    monkeypatch.undo()
    Trainer(config(max_skipped=3)).run()
    assert [line[0] for line in curve(tmp_path / "run")][-1] == 12


def test_clipping(config, straight, tmp_path):
    Trainer(config("loose", clip_grad=1e9)).run()
    assert outcome(tmp_path / "loose")[1] == outcome(straight)[1]
    Trainer(config("tight", clip_grad=1e-3)).run()
    assert curve(tmp_path / "tight")[0] == curve(straight)[0]
    assert curve(tmp_path / "tight")[-1] != curve(straight)[-1]


# ---- what is left behind ---------------------------------------------------------------------------------------------


def test_files_of_a_run(config, tmp_path, capsys):
    Trainer(config(reconstruct_every=6, log_every=5)).run()
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    keys = {"step", "loss", "lr", "images_per_second", "grad_norm", "skipped", "matmul_share", "waiting"}
    assert all(keys <= line.keys() for line in lines)
    assert all(line["images_per_second"] > 0 and 0 <= line["waiting"] <= 1 for line in lines)
    assert all(0 < line["matmul_share"] < 1 for line in lines)
    with Image.open(run / "reconstructions" / "step-00000006.png") as grid:
        # a line of titles, and four rows of pictures of 16 pixels, twelve times as large, with their margins
        assert grid.size == (3 * 200, 24 + 4 * 200)
    with Image.open(run / "loss.png") as drawn:
        # white, grid, axis labels, and the curve's own colour
        assert (0x1F, 0x77, 0xB4) in {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    output = capsys.readouterr().out
    assert "step 5/12: loss " in output and "images/s" in output and "of matmul" in output and " left" in output


def test_bfloat16_keeps_weights_and_statistics_in_float32(config, tmp_path):
    trainer = Trainer(config(dtype="bf16"))
    trainer.run()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {s["exp_avg_sq"].dtype for s in trainer.optimizer.state.values()} == {torch.float32}
    losses = [line[1] for line in curve(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_a_torn_line_of_metrics_is_taken_back(config, straight, tmp_path):
    Trainer(config(max_steps=12)).run()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    Trainer(config()).run()
    assert outcome(tmp_path / "run") == outcome(straight)
