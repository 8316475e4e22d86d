"""Runs that replay graphs by default, and captures of the steps of every shipped config."""

import contextlib
import copy

import pytest
import tape
import torch
from cases import TEST_ALL

from fastmim.train import Config, objective
from fastmim.train.batches import mapped
from fastmim.train.config import read, read_settings, shipped
from fastmim.train.distributed import Processes
from fastmim.train.flops.inputs import batch_of
from fastmim.train.graphs import GraphedUpdate, graphed, replays
from fastmim.train.masks import Masks
from fastmim.train.schedule import adamw
from fastmim.train.step import Average, Update

CPU = torch.device("cpu")
SMALL = dict(depth=2, embed_dim=32, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
MOVING = {"momentum": 0.9, "sees": "all"}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Capture on the CPU, without a draw from torch's generator, as on a GPU."""
    tape.install(monkeypatch)
    record = torch.cuda.graph

    @contextlib.contextmanager
    def graph(*args, **options):
        state = torch.get_rng_state()
        with record(*args, **options):
            yield
        torch.set_rng_state(state)

    monkeypatch.setattr(torch.cuda, "graph", graph)


def small(name, **changes):
    """Return a shipped config with a small model and small images."""
    settings = read_settings(name)
    frames = [4] if isinstance(settings["image_size"], list) else []
    settings["image_size"] = [*frames, 32, 32]
    settings["model_options"] = {
        **settings.get("model_options", {}),
        **SMALL,
        "patch_size": [*[2 for _ in frames], 4, 4],
    }
    # of 64 patches CropMAE's keeps none
    settings["mask_ratio"] = min(settings.get("mask_ratio", 0.75), 0.9)
    if settings.get("objective") == "distill":
        settings["objective_options"].update(taps=[1], teacher_taps=[1])
    return Config.of({**settings, "batch_size": 4, "device": "cpu", **changes})


def update_of(config):
    """Return an update of new weights, always the same."""
    torch.manual_seed(0)
    model, options = config.build(), dict(config.objective_options)
    if config.objective == "mae":
        made = objective.PixelObjective(model)
    else:
        teacher = copy.deepcopy(model) if options.pop("teacher", None) else None
        made = objective.Distill(model, teacher, **options)
    parts = made, made, Masks(config.mask_settings, model.grid_size), adamw(made, config), Average(model, 0.9)
    return Update(config, Processes(0, 1, CPU), *parts)


def batches_of(update, count=5):
    """Yield batches of noise and their seeds."""
    generator = torch.Generator().manual_seed(1)

    def noise(values):
        if values.is_floating_point():
            return torch.rand(values.shape, generator=generator)
        most = 2 if values.dtype == torch.bool else 256
        return torch.randint(0, most, values.shape, generator=generator, dtype=torch.uint8).to(values.dtype)

    for _ in range(count):
        batch = batch_of(update.config, update.model, update.masks, 4, CPU)
        yield mapped(batch, noise), torch.randint(2**40, (4,), generator=generator)


def on_gpu(config, **changes):
    """Return the config as a machine with a GPU would read it."""
    made = copy.copy(config)
    for name, value in {"device": "cuda", **changes}.items():
        object.__setattr__(made, name, value)
    return made


# ---- by default ------------------------------------------------------------------------------------------------------


def test_runs_replay_where_one_process_trains_on_a_gpu(config):
    assert config().cuda_graphs == "auto"
    default = on_gpu(config())
    assert replays(default) and not replays(config()) and not replays(default, world=2)
    scheduled = config(mask={"kind": "random", "mask_ratio": [0.5, 0.75]})
    for changes in (
        {"compile": True},
        {"parallel": "fsdp"},
        {"checkpoint_activations": True},
        {"dtype": "float64"},
        {"objective": "package.module:Class"},
        {"cuda_graphs": False},
    ):
        assert not replays(on_gpu(default, **changes)), changes
        assert isinstance(graphed(update_as(on_gpu(default, **changes)), pytest.fail), Update)
    assert not replays(on_gpu(scheduled))
    assert isinstance(graphed(update_as(default), pytest.fail), GraphedUpdate)
    assert isinstance(graphed(update_as(default, world=2), pytest.fail), Update)


def update_as(config, world=1):
    """Return an update of a config, of which nothing is run."""
    return Update(config, Processes(0, world, CPU), torch.nn.ParameterDict({"model": None}), None, None, None)


def test_a_default_run_replays_and_falls_back_as_one_that_asks_for_graphs(config, monkeypatch):
    output = []
    update = graphed(update_of(on_gpu(config())), output.append)
    expected = update_of(config())
    batches = list(batches_of(expected))
    assert_equal_updates(expected, update, batches)
    assert update.graph.replays == 4 and output == []

    inner = update_of(on_gpu(config()))
    monkeypatch.setattr(inner, "_clip", lambda: Update._clip(inner) * Update._clip(inner).item() ** 0)
    update = graphed(inner, output.append)
    assert_equal_updates(update_of(config()), update, batches)
    assert update.graph is None
    assert output == ["cuda_graphs: off, the update can't be captured: a value was read on the host"]


@pytest.mark.parametrize("where", ["module", "parameter", "optimiser", "everywhere", "anomaly"])
def test_hooks_follow_each_step_of_a_default_run(config, where):
    """Hooks that are registered before the second step are called in all."""
    calls, inner = [], update_of(on_gpu(config()))
    update = graphed(inner, pytest.fail)

    def hook(*_):
        calls.append(1)

    with contextlib.ExitStack() as stack:
        if where == "anomaly":
            stack.enter_context(pytest.warns(UserWarning, match="Anomaly Detection"))
            stack.enter_context(torch.autograd.detect_anomaly())
        else:
            handle = {
                "module": lambda: inner.model.blocks[0].register_forward_hook(hook),
                "parameter": lambda: inner.model.mask_token.register_hook(hook),
                "optimiser": lambda: inner.optimizer.register_step_post_hook(hook),
                "everywhere": lambda: torch.nn.modules.module.register_module_forward_hook(hook),
            }[where]()
            stack.callback(handle.remove)
        for batch in batches_of(inner, 4):
            update(*batch, 2**-8)
    assert update.graph is None and update.eager
    assert where == "anomaly" or len(calls) >= 4


def test_the_host_waits_for_the_replay_before_the_last(config, monkeypatch):
    """Otherwise batches of many steps would wait on the device."""
    log, inner = [], update_of(on_gpu(config()))
    update = graphed(inner, pytest.fail)

    class Event:
        def __init__(self, blocking):
            self.replay = None

        def record(self, stream):
            self.replay = update.graph.replays
            log.append(f"end of {self.replay}")

        def synchronize(self):
            log.append(f"wait for {self.replay}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for batch in batches_of(inner, 5):
        update(*batch, 2**-8)
    assert log == ["end of 1", "end of 2", "wait for 1", "end of 3", "wait for 2", "end of 4"]


def test_batches_of_another_dtype_are_not_replayed(config):
    output, inner = [], update_of(on_gpu(config()))
    update = graphed(inner, output.append)
    for number, (batch, seeds) in enumerate(batches_of(inner, 4)):
        images = batch.images if number != 2 else batch.images / 255
        update(batch._replace(images=images), seeds, 2**-8)
    assert update.graph.replays == 2 and len(output) == 1


def test_the_setting_is_kept_in_descriptions_of_runs(config):
    assert Config.of(config().to_dict()).cuda_graphs == "auto"
    assert read("quickstart_cpu", ["cuda_graphs=auto"]).cuda_graphs == "auto"
    assert read("quickstart_cpu", ["cuda_graphs=false"]).cuda_graphs is False


# ---- shipped configs -------------------------------------------------------------------------------------------------


def assert_equal_updates(eager, replayed, batches):
    """Compare results, weights and averages of both, bit for bit, and what they drew."""
    drawn = []
    found = []
    for update in (eager, replayed):
        torch.manual_seed(2)
        found.append([update(*batch, 2**-8) for batch in batches])
        drawn.append(torch.get_rng_state())
    assert all(torch.equal(a, b) for x, y in zip(*found) for a, b in zip(x, y))
    assert torch.equal(*drawn)
    assert len({results.loss.item() for results in found[0]}) == len(batches)
    inner = replayed.update
    assert all(map(torch.equal, eager.objective.state_dict().values(), inner.objective.state_dict().values()))
    assert all(map(torch.equal, eager.average.averages.values(), inner.average.averages.values()))


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bf16", marks=pytest.mark.skipif(not TEST_ALL, reason="slow"))]
)
@pytest.mark.parametrize("name", shipped())
def test_steps_of_every_shipped_config_are_replayed(name, dtype):
    """Dropout and drop path draw anew in each replay."""
    assert_replays(small(name, dtype=dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "distill", "objective_options": MOVING},
        {"objective": "distill", "objective_options": {**MOVING, "on": "predicted"}},
        {"mask": {"kind": "blocks", "num_masked": 30}},
        {"mask": {"kind": "random", "mask_ratio": 0.7}, "clip_grad": 0.1, "micro_batch_size": 3},
        {"data_options": {"nodata": 0}},
    ],
    ids=["own average", "predicted", "blocks", "accumulated", "missing data"],
)
def test_other_steps_are_replayed(changes):
    assert_replays(small("mae_vit_base_imagenet", **changes))


def assert_replays(config):
    """Assert that replays of a config's steps are the eager ones."""
    eager = update_of(config)
    replayed = GraphedUpdate(update_of(config), pytest.fail, wary=True)
    assert_equal_updates(eager, replayed, list(batches_of(eager)))
    assert replayed.graph.replays == 4
