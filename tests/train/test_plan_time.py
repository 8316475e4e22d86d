"""Time of a step before a run: kernels counted on a GPU, and ops timed on this machine."""

import json
import os
import statistics
import time
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.train import Config, ConfigError
from fastmim.train.config import read, shipped
from fastmim.train.flops import CARDS, DEVICE, count, count_step
from fastmim.train.flops.trainer import prepared
from fastmim.train.plan import here
from fastmim.train.plan.step_ops import calls_of, pairs_of
from fastmim.train.plan.steptime import predict, step_time

TEST_ALL = os.environ.get("FASTMIM_TEST_ALL") == "1"
H100 = CARDS["h100"]
CPU = torch.device("cpu")
TINY = dict(model="tiny", model_options=dict(depth=2, decoder_depth=2), image_size=64, batch_size=4)

triton = pytest.mark.usefixtures("with_triton")


@pytest.fixture(scope="session")
def with_triton():
    pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Turn off deterministic mode, whose fills of fresh memory would be counted and timed."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def config(tmp_path):
    def make(**settings):
        common = dict(data="skimage_photos", output_dir=str(tmp_path), device="cpu", dtype="bfloat16")
        return Config(**(common | TINY | settings))

    return make


# ---- every config that the Trainer runs ------------------------------------------------------------------------------

# two views with dropout, a teacher, cells with drop path, videos whose attention is PyTorch's
USUAL = {"cropmae_small", "dmae_base", "pixio_base", "videomae2_base"}


@triton
@pytest.mark.parametrize("name", [name for name in shipped() if TEST_ALL or name in USUAL])
def test_a_shipped_config_is_counted(name, tmp_path):
    more = [f"output_dir={tmp_path}", "batch_size=4", "device=cpu", "dtype=bfloat16"]
    found = count_step(read(name, more), H100)
    stages = {row.stage for row in found.rows}
    assert {"masking", "encoder", "optimiser"} <= stages
    assert ("teacher" in stages) == bool(found.assumed) == (name == "dmae_base")
    # SimMIM has no decoder
    assert ("decoder" in stages) != name.startswith("simmim")


ARRAYS = dict(
    model="MaskedAutoencoder",
    in_chans=5,
    model_options=dict(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
)


def arrays(axes, **settings):
    return ARRAYS | dict(
        image_size=axes * (16,), model_options=ARRAYS["model_options"] | dict(patch_size=axes * (4,)), **settings
    )


@triton
@pytest.mark.parametrize(
    "settings",
    [
        arrays(1),
        arrays(3, mask=dict(kind="tube", mask_ratio=0.5)),
        arrays(2, data_options=dict(nodata=0), mask=dict(kind="cells", cell=1, mask_ratio=0.5)),
        arrays(2, data_options=dict(nodata=0), mask=dict(kind="blocks", num_masked=2)),
        dict(ema=0.99, mask=dict(kind="random", mask_ratio=[0.5, 0.9]), clip_grad=1.0),
        dict(objective="distill", objective_options=dict(momentum=0.9, loss="absolute")),
        dict(patchwise=True, data_options=dict(repeats=2)),
        dict(dtype="float64", checkpoint_activations=True),
        dict(
            model="croco_vit_base_patch16",
            data_options=dict(covisible=True),
            mask=dict(kind="hardest", mask_ratio=0.75, share=0.5),
        ),
        dict(model="cropmae_vit_small_patch16", inner=(0.3, 0.6), checkpoint_activations=True, model_options={}),
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_settings_are_counted(settings, config):
    found = count_step(config(**settings), H100)
    assert found.flops > 0 and found.launches > 100
    stages = {row.stage for row in found.rows}
    assert ("average" in stages) == ("ema" in settings or "momentum" in settings.get("objective_options", {}))


@triton
def test_parts_that_are_alike_are_counted_once(config):
    settings = config(batch_size=11, micro_batch_size=3)
    once, whole = count_step(settings, H100), count(lambda: prepared(settings, DEVICE, 11), H100)
    for name in ("launches", "bytes", "flops"):
        assert getattr(once, name) == getattr(whole, name)
    assert once.milliseconds == pytest.approx(whole.milliseconds)
    assert all(row.launches > 0 for row in once.rows)


@triton
def test_recomputed_blocks_call_the_kernels_of_the_first_time(config):
    """Blocks of CropMAE drop in attention, whose kernels differ from those of tensors without values."""
    settings = dict(model="cropmae_vit_small_patch16", inner=(0.3, 0.6), model_options={})
    found = [count_step(config(checkpoint_activations=again, **settings), H100) for again in (False, True)]
    kernels = [{row.kernel for row in counted.rows} for counted in found]
    assert "_scaled_dot_product_flash_attention" in kernels[0]
    assert kernels[0] - kernels[1] == set() and found[0].flops < found[1].flops < 4 / 3 * found[0].flops


def test_a_teacher_without_a_known_size_is_refused(config):
    settings = config(objective="distill", objective_options=dict(teacher="/nowhere/of_my_own.pth"))
    with pytest.raises(ConfigError, match=r"objective_options.teacher: /nowhere/of_my_own.pth does not exist"):
        count_step(settings, H100)


# ---- floor and prediction --------------------------------------------------------------------------------------------


@triton
def test_the_stages_add_up_to_the_count(config):
    settings = config(batch_size=8)
    floor, counted = (
        step_time(settings, H100, micro_batch=2),
        count_step(config(batch_size=8, micro_batch_size=2), H100),
    )
    assert floor.milliseconds == pytest.approx(counted.milliseconds)
    assert (floor.flops, floor.bytes, floor.launches) == (counted.flops, counted.bytes, counted.launches)
    assert floor.host_milliseconds is None
    # kernels this small are bound by their launch, but for those of all weights
    assert {s.bound_by for s in floor.stages if s.direction != "update"} == {"launches"}
    large = {(s.stage, s.direction): s.bound_by for s in step_time(config(batch_size=4096), H100).stages}
    assert large["encoder", "forward"] != "launches" and large["optimiser", "update"] == "bytes"


def measured(path, **row):
    step = dict(stage="steps", name="a step", model="tiny", batch=4, mask_ratio=0.75, decode_ratio=1.0, form="fastmim")
    rows = [
        dict(stage="environment", name="machine", card="NVIDIA H100 80GB HBM3"),
        step | dict(how="eager", milliseconds=1.0) | row,
        step | dict(how="eager", milliseconds=7.0, batch=512),
        step | dict(how="eager", milliseconds=0.1, wrong="loss"),
        step | dict(how="eager", milliseconds=0.1, form="plain-gather"),
    ]
    path.write_text(json.dumps({"visits": [{"visit": "first", "rehearse": False, "rows": rows}]}))
    return path


@triton
def test_a_prediction_is_the_floor_over_the_efficiency_measured_on_the_card(config, tmp_path):
    path = measured(tmp_path / "gpu.json", milliseconds=5.0)
    whole = config(model_options={}, image_size=224, batch_size=4)
    floor = step_time(whole, H100)
    found = predict(whole, H100, floor, path)
    # the step that was measured, but for clipping, is this one
    assert found.milliseconds == pytest.approx(5.0, rel=0.02)
    assert found.efficiency == pytest.approx(floor.milliseconds / 5, rel=0.02)
    assert "NVIDIA H100 80GB HBM3" in found.source and "5.0 ms" in found.source
    for card, settings in ((CARDS["a100"], whole), (H100, config(model="small", model_options={}))):
        found = predict(settings, card, floor, path)
        assert (found.milliseconds, found.efficiency) == (None, None)
        assert f"not measured on {card.name}; images/s are at most" in found.source


def test_results_that_are_no_results_are_refused(config, tmp_path):
    for text in ("{", "{}", '{"visits": [3]}'):
        (tmp_path / "gpu.json").write_text(text)
        with pytest.raises(ValueError, match=r"measured .*gpu.json must be a file that benchmarks/gpu_report.py wrote"):
            predict(config(), H100, None, tmp_path / "gpu.json")
    with pytest.raises(ValueError, match=r"measured .*absent.json must be a file"):
        predict(config(), H100, None, tmp_path / "absent.json")


# ---- this machine ----------------------------------------------------------------------------------------------------


def test_recorded_ops_are_those_of_a_real_step(config):
    settings = config(dtype="float32")
    real = Counter()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            real[str(func)] += 1
            return func(*args, **(kwargs or {}))

    step, _ = prepared(settings, CPU, 4)
    step()
    with Seen():
        step()
    recorded = Counter(str(call.func) for call in calls_of(settings, 4))
    # constants are made anew where they have no values, and a gradient that is used up is not scaled in place
    for op in ("aten.stack.default", "aten.full.default", "aten.mul.Tensor"):
        recorded.pop(op, None), real.pop(op, None)
    assert {op: real[op] for op in recorded} == recorded
    assert recorded["aten.mm.default"] > 20 and recorded["aten._fused_adamw_.default"] == 2
    # none of these tensors is kept for later steps
    step()


FULL = dict(model_options={}, image_size=224, dtype="float32")
MACHINE = {
    "tiny, batch 8": dict(model="tiny", batch_size=8),
    "tiny, batch 64": dict(model="tiny", batch_size=64),
    "small": dict(model="small", batch_size=16),
    "base": dict(model="base", batch_size=16),
    "base, dual masking": dict(model="base", batch_size=32, mask_ratio=0.9, decode_ratio=0.25),
    "video": dict(
        model="videomae_vit_small_patch16",
        image_size=(16, 224, 224),
        mask=dict(kind="tube", mask_ratio=0.9),
        batch_size=2,
        norm_pix_loss="channel",
    ),
}
# best of so many rounds: other processes share caches and memory with this one
ROUNDS = 3


@pytest.mark.parametrize("name", [name for name in MACHINE if TEST_ALL or name == "tiny, batch 8"])
def test_a_step_takes_as_long_as_estimated(name, config):
    """Compare times of one thread's own processor, of steps before and after the calibration."""
    settings = config(**(FULL | MACHINE[name]))
    threads, ratios = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        step, _ = prepared(settings, CPU, settings.batch_size)
        step()
        for _ in range(ROUNDS):
            laps = [_lap(step) for _ in range(2)]
            rates = here.calibrate(settings, seconds=10 if TEST_ALL else 3)
            laps += [_lap(step) for _ in range(2)]
            found = here.step_time_here(settings, rates)
            ratios.append(found.milliseconds / statistics.median(laps))
            if abs(ratios[-1] - 1) <= 0.2:
                break
    finally:
        torch.set_num_threads(threads)
    assert min(abs(ratio - 1) for ratio in ratios) <= 0.2, ratios
    assert found.host_milliseconds > 0 and rates.product > 1e9 and rates.copy > 1e8
    assert next(stage for stage in found.stages if stage.stage == "encoder").bound_by == "products"


def _lap(step):
    start = time.thread_time()
    step()
    return 1e3 * (time.thread_time() - start)


def test_rates_of_fewer_samples_serve_more(config):
    """Ops of a calibration are found again in a step of more samples, and take as many times longer."""
    few, many = config(dtype="float32"), config(dtype="float32", batch_size=16)
    rates = here.calibrate(few, seconds=1.0)
    times = [here.step_time_here(settings, rates) for settings in (few, many)]
    assert times[1].flops == 4 * times[0].flops
    assert times[0].milliseconds < times[1].milliseconds < 4 * times[0].milliseconds
    calls = pairs_of(many, 16)
    assert sum(key in rates.ops for call, _, key in calls if call.flops) > 0.8 * sum(bool(c.flops) for c, *_ in calls)
