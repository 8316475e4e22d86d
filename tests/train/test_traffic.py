"""Bytes that processes exchange: as counted from a config, as the Trainer asks for them, and as they cross the wire."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import TEST_ALL
from small_run import ENVIRONMENT, SETTINGS

from fastmim.train import Config, objective
from fastmim.train.flops import CARDS
from fastmim.train.plan.traffic import LATENCY, REACHED, Collective, Links, Traffic, exchange, traffic

# runs one after another in the same processes, and prints what a step calls and what crosses the loopback device
COUNTING = """
import contextlib, json, sys
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastmim.train import Trainer

store, runs, rank, world = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:])
dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
         "all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather"}

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented
        space, _, name = func.name().partition("::")
        made = func(*args, **(kwargs or {}))
        if "c10d" in space and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            tensors = [t for t in tree_leaves((args, made)) if isinstance(t, torch.Tensor)]
            # the largest is the whole one
            calls.append((KINDS.get(name, name), max(t.nbytes for t in tensors)))
        return made

def sent():
    lines = open("/proc/net/dev").read().split("lo:")
    return int(lines[1].split()[8])

class Done(Exception):
    pass

class Counted(Trainer):
    def _update(self, batch):
        # what a step sends has arrived before its flag, with which it ends
        if self.step == FIRST:
            calls.clear()
            self.bytes = sent()
        if self.step == LAST:
            self.found = list(calls), sent() - self.bytes
            raise Done
        super()._update(batch)

FIRST, LAST = 3, 7
for settings in runs:
    calls = []
    trainer = Counted(settings)
    with Seen(), contextlib.suppress(Done):
        trainer.run()
    if rank == 0:
        print(json.dumps(trainer.found))
"""
STEPS = 4
WIDE = {**SETTINGS["model_options"], "embed_dim": 96, "decoder_embed_dim": 64}
RUNS = [
    {"parallel": "ddp", "clip_grad": 1.0},
    {"parallel": "fsdp", "micro_batch_size": 1, "clip_grad": 1.0},
]
if TEST_ALL:
    RUNS += [
        {"parallel": "fsdp"},
        {"parallel": "ddp", "micro_batch_size": 1, "dtype": "float64"},
        {"parallel": "fsdp", "model": "crossmae_vit_small_patch16"},
        {"parallel": "ddp", "model": "crossmae_vit_small_patch16"},
    ]


def settings(photos, folder, **changes):
    options = {**SETTINGS, "model_options": WIDE, "max_steps": 14, "checkpoint_every": 1000, "log_every": 1000}
    if "model" in changes:
        options["model_options"] = {"patch_size": 4}
    return {"data": str(photos), "output_dir": str(folder), **options, **changes}


def isolated() -> list[str]:
    """Return the command that runs another one in a network of its own; none where none can be made."""
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not (shutil.which("unshare") and shutil.which("ip")):
        return []
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


@pytest.fixture(scope="module", params=[2, 3, 4] if TEST_ALL else [2])
def counted(request, photos, tmp_path_factory):
    """Return the number of processes, and for each run its config, its collectives and the bytes on the wire."""
    world, folder = request.param, tmp_path_factory.mktemp("counted")
    runs = [settings(photos, folder / str(i), batch_size=2 * world, **run) for i, run in enumerate(RUNS)]
    script = folder / "counting.py"
    script.write_text(COUNTING)
    alone = isolated()
    processes = " & ".join(
        f'RANK={rank} WORLD_SIZE={world} "$0" {script} {folder / "store"} "$1" {rank} {world}' for rank in range(world)
    )
    done = subprocess.run(
        [*alone, "sh", "-c", processes + " & wait", sys.executable, json.dumps(runs)],
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(found) == len(runs), done.stderr[-4000:]
    return world, [(Config.of(run), calls, wire if alone else None) for run, (calls, wire) in zip(runs, found)]


def predicted(config, world):
    return traffic(config, built(config), world=world)


def built(config):
    with torch.device("meta"):
        return objective.build(config.objective, config.objective_options, config.build())


def test_collectives_are_those_of_the_trainer(counted):
    world, runs = counted
    for config, calls, _ in runs:
        ours = predicted(config, world)
        kinds = {kind: sum(size for name, size in calls if name == kind) / STEPS for kind, _ in calls}
        assert kinds == ours.by_kind(), config.parallel
        assert len(calls) == STEPS * sum(c.calls for c in ours.collectives)


def test_as_many_bytes_cross_the_wire(counted):
    """Compare the loopback device's own count; gloo scatters by reducing everything everywhere, in twice the bytes."""
    world, runs = counted
    if any(wire is None for *_, wire in runs):
        pytest.skip("no network namespace can be made here")
    for config, _, wire in runs:
        ours = predicted(config, world)
        sent = ours.sent + sum(c.sent(world) for c in ours.collectives if c.kind == "reduce_scatter")
        # headers and acknowledgements are counted too
        assert world * sent * STEPS <= wire < 1.05 * world * sent * STEPS, config.parallel


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def huge(tmp_path):
    return lambda **changes: Config.of(
        {"data": "none", "output_dir": str(tmp_path), "model": "huge", "device": "cpu", "batch_size": 4096, **changes}
    )


def test_one_process_sends_nothing(huge):
    for parallel in ("ddp", "fsdp"):
        assert predicted(huge(parallel=parallel), 1).sent == 0


def test_sharding_sends_half_as_much_again(huge):
    """Compare 2 gatherings and a scattering with an all-reduce, which is one of each."""
    ddp, fsdp = (predicted(huge(parallel=parallel), 8).sent for parallel in ("ddp", "fsdp"))
    assert fsdp / ddp == pytest.approx(1.5, rel=0.01)


def test_micro_batches_gather_weights_again(huge):
    config = huge(parallel="fsdp")
    once, four = (traffic(config, built(config), world=8, micro_batch=size).by_kind() for size in (512, 128))
    assert four["all_gather"] == 4 * once["all_gather"]
    assert {k: v for k, v in four.items() if k != "all_gather"} == {k: v for k, v in once.items() if k != "all_gather"}


def test_more_nodes_take_longer(huge):
    config = huge(parallel="ddp", batch_size=8192)
    model = built(config)

    def seconds(gpus, nodes, backward=0.0):
        links = Links.of(CARDS["h100"], gpus, nodes)
        return exchange(traffic(config, model, world=gpus * nodes), links, 0.0, backward)

    assert seconds(1, 1).total == 0
    assert seconds(2, 1).total < seconds(8, 1).total < seconds(8, 8).total
    # a slow enough backward pass hides all but the last bucket and what follows the pass
    hidden, shown = seconds(8, 8, 10.0), seconds(8, 8)
    assert hidden.total == shown.total == shown.exposed
    assert 0 < hidden.exposed < 0.05 * shown.exposed


def test_time_of_a_ring():
    """Compute the time of an all-reduce of 1 GB over four GPUs by hand: each sends 1.5 GB."""
    reduced = Collective("all_reduce", "gradients", "backward", 40, 10**9)
    found = exchange(Traffic(4, 1, (reduced,)), Links(4, 1, 100e9, math.inf), 0.0, 0.01)
    assert found.total == pytest.approx(1.5e9 / (REACHED * 100e9) + 40 * LATENCY[0])
    assert found.exposed == pytest.approx(found.total - 0.01)
    between = replace(Links(2, 2, 100e9, 10e9))
    assert exchange(Traffic(4, 1, (reduced,)), between, 0.0, 0.0).total == pytest.approx(
        1.5e9 / (REACHED * 10e9) + 40 * LATENCY[1]
    )
