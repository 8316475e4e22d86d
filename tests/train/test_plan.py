"""Plans of runs: what they hold, that they grow and shrink as they must, and what is refused."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import TEST_ALL
from safetensors import safe_open
from small_run import SETTINGS

from fastmim import cli
from fastmim.cli import plan_command
from fastmim.train import Config, Trainer
from fastmim.train.config import read_settings
from fastmim.train.flops import CARDS
from fastmim.train.flops.cards import custom
from fastmim.train.flops.inputs import objective_of
from fastmim.train.plan import measured, steptime, storage
from fastmim.train.plan.estimate import Machines, estimate
from fastmim.train.plan.memory import memory
from fastmim.train.plan.planned import countable, planned, share
from fastmim.train.plan.planner import Given, make_plan
from fastmim.train.plan.report import KINDS, report, size_of

pytest.importorskip("triton")

KEYS = ("images_per_second", "step_milliseconds", "memory_bytes_per_gpu", "bound_by", "days", "unknown")
BOUNDS = {"products", "bytes", "launches", "communication", "loader"}


@pytest.fixture(autouse=True, scope="module")
def no_measured_steps():
    """Steps are floors, whatever was measured on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steptime, "MEASURED", Path("nowhere"))
        yield


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Turn off deterministic mode, whose fills of fresh memory would be counted."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


# of the quickstart, for one GPU or eight
SMALL = "quickstart_cpu", "max_steps=none", "batch_size=512", "model_options.depth=2", "model_options.decoder_depth=1"

BASE = "mae_vit_base_imagenet", "batch_size=512"


def machines(card="h100", gpus=1, nodes=1, loader_rate=None):
    return Machines(CARDS[card] if isinstance(card, str) else card, gpus, nodes, loader_rate)


def read(source, *overrides):
    return planned(read_settings(source, overrides), on_gpu=True)


def plan(*source, images=None, disk_rate=None, **on):
    return make_plan(read(*source), machines(**on), Given(images, disk_rate))


def step(*source, micro_batch=None, **on):
    config, on = read(*source), machines(**on)
    objective = objective_of(config, torch.device("meta"))
    return estimate(config, objective, on, micro_batch or config.batch_size // on.world)


@pytest.fixture(scope="module")
def small():
    """Return a plan on 8 GPUs."""
    torch.use_deterministic_algorithms(False)
    return plan(*SMALL, gpus=8, images=10000)


def command(capsys, *arguments):
    """Run `fastmim plan`; return its exit status and what it prints."""
    status = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---- the command -----------------------------------------------------------------------------------------------------


def test_json_and_text_say_the_same(capsys, small):
    given = [*SMALL, "--gpus", "8", "--images", "10000"]
    status, printed, _ = command(capsys, *given, "--json")
    found = json.loads(printed)
    assert status == 0 and set(KEYS) <= set(found)
    assert found == json.loads(json.dumps(small))
    text = report(found)
    assert "images/s            0.406 at most" in report(found | {"images_per_second": 0.4063})
    assert f"{found['images_per_second']:,.0f} at most" in text
    assert f"{found['step_milliseconds']:,.1f} ms at least, bound by {found['bound_by']}" in text
    assert f"{found['days']:.2f} days" in text
    assert size_of(found["memory_bytes_per_gpu"]) in text
    assert all(" ".join(sentence.split()) in " ".join(text.split()) for sentence in found["unknown"])
    # a screen and a half, of lines that fit
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 120
    if TEST_ALL:
        assert command(capsys, *given)[1] == text + "\n"


def test_figures_fit_together(small):
    assert small["bound_by"] in BOUNDS
    assert small["images_per_second"] == pytest.approx(1e3 * 512 / small["step_milliseconds"])
    assert small["steps"] == 800 * (10000 // 512)
    assert small["days"] * 86400 == pytest.approx(1e-3 * small["step_milliseconds"] * small["steps"])
    assert small["gpu_hours"] == pytest.approx(small["days"] * 24 * 8)
    assert sum(part["milliseconds"] for part in small["stages"]) == pytest.approx(small["step_milliseconds"])
    assert sum(small["milliseconds_by_bound"].values()) == pytest.approx(small["step_milliseconds"])
    memory = small["memory"]
    kinds = [memory[kind] for kind in KINDS]
    assert sum(kinds) + sum(memory["activations"].values()) == memory["total"] == small["memory_bytes_per_gpu"]
    assert small["loader"]["images_per_second_per_host"] == pytest.approx(small["images_per_second"])
    # AdamW has two moments of what is trained
    trained = memory["optimizer"] / 2
    assert small["traffic"]["bytes_sent_per_gpu"] == pytest.approx(2 * 7 / 8 * trained, rel=0.02)
    assert len(small["fits"]) == 4 and all(fit["micro_batch"] >= 64 for fit in small["fits"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "CONFIG must be a TOML file or one of"),
        (
            ["quickstart_cpu", "--gpu", "gtx"],
            r"--gpu must be one of h100, .*custom with --memory-gb, --copy-tbs.*'gtx'",
        ),
        (["quickstart_cpu", "--gpu", "custom"], "--gpu custom needs --memory-gb, --copy-tbs and --product-tflops"),
        (["quickstart_cpu", "--memory-gb", "3"], r"--memory-gb.* are for --gpu custom; got --gpu h100"),
        (
            ["quickstart_cpu", "--gpus", "3"],
            "batch_size must be a multiple of the 3 GPUs, got 64; 63 and 66 are nearest",
        ),
        (["quickstart_cpu", "--gpus", "128"], "of the 128 GPUs, got 64; 128 is nearest"),
        (["quickstart_cpu", "--gpus", f"{10**18}"], "must be a multiple of the 1000000000000000000 GPUs, got 64"),
        (["--gpus", "3", "quickstart_cpu", "batch_size=32"], "got 32; 30 and 33 are nearest"),
        (["quickstart_cpu", "seed=1", "--gpus", "3", "batch_size=32"], "got 32; 30 and 33 are nearest"),
        (["quickstart_cpu", "--here", "--gpu", "h100"], "--here plans for this machine as it is"),
        (["quickstart_cpu", "device=tpu"], "device must be one of auto, cpu, cuda; got 'tpu'"),
        (["quickstart_cpu", "cuda_graphs=true", "parallel=fsdp"], "parallel must be auto or ddp with cuda_graphs"),
        (["quickstart_cpu", "cuda_graphs=true", "--gpus", "2"], "compile must be true with cuda_graphs over 2"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    status, printed, error = command(capsys, *arguments)
    assert (status, printed) == (1, "") and error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize("option", ["--gpus", "--disk-gbs", "--images", "--memory-gb"])
@pytest.mark.parametrize("number", ["0", "-1", "nan", "1e300"])
def test_numbers_are_above_zero(capsys, option, number):
    with pytest.raises(SystemExit):
        cli.main(["plan", "quickstart_cpu", option, number])
    assert "must be a" in capsys.readouterr().err


def test_what_is_no_setting_is_refused_after_options(capsys):
    for command in (["plan", "quickstart_cpu", "--gpus", "3", "huge"], ["stats", "data", "--axes", "2", "seed=1"]):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert f"unrecognized arguments: {command[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, gpus, nodes",
    [([], 1, 1), (["--gpus", "8"], 8, 1), (["--gpus", "64"], 8, 8), (["--gpus", "12"], 6, 2)]
    + [(["--gpus", "4", "--nodes", "3"], 4, 3), (["--nodes", "2"], 1, 2)],
)
def test_gpus_and_nodes(given, gpus, nodes):
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    assert plan_command._nodes(parser.parse_args(["quickstart_cpu", *given])) == (gpus, nodes)


# ---- what is planned -------------------------------------------------------------------------------------------------


def test_a_plan_for_gpus_needs_none_and_changes_no_rule(tmp_path):
    settings = {"data": "nowhere", "output_dir": str(tmp_path / "run"), **SETTINGS, "cuda_graphs": True}
    config = planned({**settings, "device": "auto"}, on_gpu=True)
    assert (config.device, config.dtype, config.cuda_graphs) == ("cuda", "bfloat16", True)
    here = planned({**settings, "device": "auto", "cuda_graphs": False}, on_gpu=False)
    assert (here.device, here.dtype) == ("cpu", "float32")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be auto or cpu where torch finds no CUDA device"):
            Config.of({**settings, "device": "cuda"})
    assert not (tmp_path / "run").exists()


def test_more_gpus_need_less_memory_each_if_sharded():
    config = countable(read(*SMALL, "parallel=fsdp"))
    sizes = [memory(config, world=world, micro_batch=1, device="cuda") for world in (1, 2, 8)]
    for kind in ("weights", "optimizer", "total"):
        found = [getattr(size, kind) for size in sizes]
        assert found == sorted(found, reverse=True) and found[0] > found[-1], kind


def test_faster_cards_take_less_time():
    slow, fast = (step(*BASE, card=card).milliseconds for card in ("a100", "h100"))
    assert fast < slow
    assert step(*BASE, card=custom(80, 3.0, 800)).milliseconds == pytest.approx(fast, rel=0.02)


def test_a_slow_loader_bounds_the_step():
    slow, free = step(*SMALL, gpus=8, loader_rate=1000.0), step(*SMALL, gpus=8)
    assert (slow.bound_by, slow.milliseconds) == ("loader", pytest.approx(512))
    assert step(*SMALL, gpus=8, loader_rate=1e9).milliseconds == pytest.approx(free.milliseconds)


def test_a_slow_network_bounds_the_step():
    found = step("mae_vit_large_imagenet", "batch_size=64", card="4090", gpus=8, nodes=4)
    assert found.bound_by == "communication"


def test_float32_is_said_to_be_slower_than_counted():
    found = plan(*SMALL, "dtype=float32", card=replace(CARDS["h100"], memory=None))
    assert "Products of float32 are taken at the card's rate of bfloat16" in " ".join(found["unknown"])


def test_small_steps_wait_for_launches_but_in_graphs():
    few, graphs = step("quickstart_cpu", "cuda_graphs=false"), step("quickstart_cpu")
    assert few.bound_by == "launches"
    assert graphs.milliseconds < few.milliseconds
    # several processes replay nothing
    assert step("quickstart_cpu", gpus=2).bound_by == "launches"


def test_micro_batches_take_longer_than_a_batch():
    whole, parts = step(*BASE), step(*BASE, micro_batch=100)
    assert (parts.micro_batch, parts.micro_batches) == (86, 6)
    assert parts.milliseconds > whole.milliseconds


def test_a_batch_that_can_not_be_doubled_is_too_small():
    found = plan("quickstart_cpu", gpus=8, nodes=8, disk_rate=1e9, loader_rate=1e5)
    assert found["doubled"]["bottleneck"] == "batch too small"
    # and what is given is known
    assert found["days"] > 0 and found["checkpoint"]["seconds"] > 0
    assert not any(words in " ".join(found["unknown"]) for words in ("--images N", "--loader-rate", "--disk-gbs"))


def test_batches_that_do_not_fit_are_accumulated():
    found = plan(*SMALL, card=custom(1.55, 3.0, 800))
    assert found["micro_batches"] > 1 and found["micro_batch_size"] * found["micro_batches"] >= 512
    assert found["memory_bytes_free"] >= 0
    assert f"set micro_batch_size={found['micro_batch_size']}" in " ".join(report(found).split())
    assert found["days"] is found["steps"] is found["checkpoint"]["seconds"] is None
    text = " ".join(found["unknown"])
    for words in ("No step was timed", "is a floor", "--images N", "--loader-rate", "--disk-gbs", "not of 48 x 48"):
        assert words in text
    # what was measured is no floor
    assert "at least" in report(found) and "at least" not in report(found | {"here": True})


def test_what_does_not_fit_is_refused_with_what_would_fit():
    with pytest.raises(
        ValueError, match=r"micro-batch of 1 sample needs [\d.]+ GB of a GPU, [\d.]+ GB more .* what fits: .*--gpu h100"
    ):
        plan(*SMALL, card=custom(1.501, 1.0, 100))


def test_cards_without_room_and_data_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"card of 0.5 GB.* must have more than the 1.5 GB that are left for CUDA"):
        plan(*SMALL, card=custom(0.5, 1.0, 100))
    with pytest.raises(ValueError, match=r"data_options.repeats must be an int of at least 1, got 0"):
        plan(*SMALL, "data_options.repeats=0")
    with pytest.raises(ValueError, match="batch_size must be at most the 511 images of the data, got 512"):
        plan(*SMALL, images=511)


def test_a_teacher_that_is_not_here_is_taken_by_its_name():
    given = "objective=distill", "objective_options.teacher=mae_vit_tiny.pth", "model_options.patch_size=16"
    found = plan(*SMALL, *given, card=replace(CARDS["h100"], memory=None))
    assert found["unknown"][0].startswith(
        "The teacher mae_vit_tiny.pth does not exist here, and is taken to be mae_vit"
    )
    # beside the student's weights, which AdamW has two moments of
    assert found["memory"]["weights"] > found["memory"]["optimizer"] / 2 + 1e6


@pytest.mark.skipif(not TEST_ALL, reason="takes half a minute: make test-all")
def test_a_micro_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"micro-batch of 512 samples .*what fits: micro_batch_size=\d+"):
        plan(*SMALL, "micro_batch_size=512", card=custom(1.55, 3.0, 800))


@pytest.mark.parametrize("size, world, message", [(100, 8, "96 and 104 are nearest"), (3, 8, "8 is nearest")])
def test_shares(size, world, message, config):
    with pytest.raises(ValueError, match=rf"multiple of the {world} GPUs, got {size}; {message}"):
        share(config(batch_size=size), world)


# ---- storage and measurements ----------------------------------------------------------------------------------------


def test_checkpoints_have_the_counted_size(config):
    small = config(ema=0.99, max_steps=2, checkpoint_every=2)
    Trainer(small).run()
    folder = Path(small.output_dir)
    (path,) = (path for path in (folder / "checkpoints").glob("step-*2"))
    written = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            written += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    objective = objective_of(small, torch.device("meta"))
    assert storage.checkpoint_bytes(small, objective) == written
    final = folder / "final" / "model.safetensors"
    assert storage.final_bytes(objective) == pytest.approx(final.stat().st_size, rel=0.1)


def test_a_disk_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WRITTEN", 1 << 20)
    assert storage.disk_rate(tmp_path / "not" / "there") > 0
    assert not list(tmp_path.iterdir())


def test_measured_cards_are_used(tmp_path):
    rows = [
        {"stage": "environment", "name": "machine", "card": "NVIDIA A100-SXM4-80GB"},
        {"stage": "environment", "name": "ceilings", "bytes": 1.7e12, "flops": 2.6e14},
    ]
    visit = {"visit": "first", "rehearse": False, "commit": "a" * 40, "rows": rows}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"visits": [visit]}))
    card = measured.measured_card("a100", path)
    assert (card.copy, card.product) == (1.7e12, 2.6e14) and "measured on NVIDIA A100-SXM4-80GB" in card.source
    for other in ("a100-40", "h100"):
        assert measured.measured_card(other, path) == CARDS[other]
    path.write_text(json.dumps({"visits": [{**visit, "rehearse": True}]}))
    assert measured.measured_card("a100", path) == CARDS["a100"]
    rows[0]["card"] = "NVIDIA H100 PCIe"
    path.write_text(json.dumps({"visits": [visit]}))
    assert measured.measured_card("h100", path) == CARDS["h100"]
    assert measured.measured_card("h100-pcie", path).copy == 1.7e12
