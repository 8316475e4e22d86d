"""Start runs of several processes by forks of this one, so that none of them costs a start of Python.

Reads lines of JSON with "config", "world", "log" and, if wanted, "hook" and "at"; answers each by a line with the exit
statuses of the processes, negative after a signal. A process that takes longer than two minutes is killed.
"""

import errno
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback

from fastmim.train import Config, Trainer, meter
from fastmim.train.checkpoint import shard_writer, store
from fastmim.train.objective import PixelObjective

# imported late by runs
LATE = "matplotlib.figure PIL.Image safetensors.torch tensorboard.summary.writer.record_writer torch._dynamo tqdm"
for name in LATE.split():
    importlib.import_module(name)


def at_shard(act, step, rank):
    """Call `act` instead of writing the shard of a process at a step."""
    original = shard_writer.ShardWriter._write

    def altered(self, plan, planner):
        if f"step-{step:08d}" in str(self.path) and int(os.environ["RANK"]) in rank:
            act(self)
        original(self, plan, planner)

    shard_writer.ShardWriter._write = altered


def fail(number):
    def act(writer):
        raise OSError(number, os.strerror(number), str(writer.path))

    return act


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(at):
    """Send SIGTERM to the last process in step `at`, while the save of step 4 is slow."""
    at_shard(lambda _: time.sleep(1), 4, (1,))
    update = Trainer._update

    def altered(self, batch):
        if self.step == at - 1 and self.processes.rank == self.processes.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, batch)

    Trainer._update = altered


def recorded(at):
    """Write samples and masks of each update into a folder, a file for each process; stop all after a step, if given.

    at: the folder, and the step or None.
    """
    folder, stop = at
    if stop is not None:
        interrupted(stop)
    forward, path = PixelObjective.forward, os.path.join(folder, f"{os.environ['RANK']}.jsonl")

    def altered(self, batch, mask):
        with open(path, "a") as file:
            file.write(json.dumps([batch.ids.tolist(), mask.ids_keep.tolist(), mask.ids_predict.tolist()]) + "\n")
        return forward(self, batch, mask)

    PixelObjective.forward = altered


def killed_after_writing(at):
    """Kill all processes when the shards of a step are written, and nothing else is."""
    complete = store.complete

    def altered(aside, sums, state):
        if state["step"] == at:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        return complete(aside, sums, state)

    store.complete = altered


def unshared(at):
    """Give each process a working directory of its own in the folder `at`."""
    own = os.path.join(at, os.environ["RANK"])
    os.mkdir(own)
    os.chdir(own)


def vanishing(at):
    """Hide the shard of the second process from the first one."""
    entry_of = store.entry_of

    def altered(path):
        entry = entry_of(path)
        if f"step-{at:08d}" in str(path) and "shard-00001" in path.name:
            path.rename(path.with_name("elsewhere"))
        return entry

    store.entry_of = altered


# a measurement that only the printed speed needs
meter.matmul_rate = lambda device, dtype: 1e9

HOOKS = {
    "interrupted": interrupted,
    "recorded": recorded,
    "full": lambda at: at_shard(fail(errno.ENOSPC), at, (1,)),
    "broken": lambda at: at_shard(fail(errno.EIO), at, (1,)),
    "both fail": lambda at: (at_shard(fail(errno.ENOSPC), at, (0,)), at_shard(fail(errno.EROFS), at, (1,))),
    "killed": lambda at: at_shard(kill, at, (1,)),
    "first killed": lambda at: at_shard(kill, at, (0,)),
    "killed after writing": killed_after_writing,
    "unshared": unshared,
    "vanishing": vanishing,
    "": lambda at: None,
}


def child(order, rank, port) -> None:
    os.setpgid(0, order["group"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["world"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        HOOKS[order.get("hook", "")](order.get("at"))
        Trainer(Config.of(order["config"])).run()
        status = 0
    except SystemExit as end:
        status = end.code
    except (OSError, ValueError) as error:
        print(f"fastmim: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        order["group"] = 0
        for rank in range(order["world"]):
            pid = os.fork()
            if not pid:
                child(order, rank, port)
            order["group"] = order["group"] or pid
            os.setpgid(pid, order["group"])
            children.append(pid)
        found, end = {}, time.monotonic() + 120
        while len(found) < len(children):
            for pid in children:
                if pid not in found:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        found[pid] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > end:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        print(json.dumps([found[pid] for pid in children]), flush=True)


main()
