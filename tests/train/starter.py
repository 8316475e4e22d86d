"""Starts torchrun in the namespaces of machines, as forks of a process that has imported everything.

Each line on standard input is a job: {"pid", "argv", "log", "gate"}. It is torchrun's launcher with these arguments,
among the namespaces of process `pid`; its output goes to `log`, its exit status to `log`.rc. Its workers are forks that
run `fastmim` with what follows in argv, and wait before step N until the number in the file `gate` is above N.
"""

import ctypes
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

from fastmim import cli
from fastmim.train import Trainer

LATE = "matplotlib.figure", "PIL.Image", "safetensors.torch", "tensorboard.summary.writer.record_writer", "tqdm"


def enter(pid: int, kinds: tuple[str, ...] = ("net", "uts", "pid", "mnt")) -> None:
    """Enter namespaces of a process; that of process numbers counts for children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    for file in files:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)


def work(*arguments: str) -> None:
    """Run `fastmim`, as a process that torchrun started."""
    gate, update = Path(os.environ["GATE"]), Trainer._update

    def gated(self, batch):
        while int(gate.read_text() or 0) <= self.step and not self.signals.received:
            time.sleep(0.02)
        update(self, batch)

    Trainer._update = gated
    sys.exit(cli.main(arguments))


def launch(job: dict) -> int:
    """Run torchrun to its end in this process; return its exit status."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="eth0",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        GATE=job["gate"],
    )
    # the first argument is python's
    config, _, (_, *arguments) = run.config_from_args(run.parse_args(job["argv"]))
    config.start_method = "fork"
    try:
        elastic_launch(config, work)(*arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(job: dict) -> None:
    """Start a job in a child, which enters the namespaces, and a child of that, which is among their processes."""
    if os.fork():
        return
    os.close(0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    enter(job["pid"])
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        # the file system is that of the machine
        Path(f"{job['log']}.rc").write_text(str(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    status = launch(job)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    for name in LATE:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        start(json.loads(line))


if __name__ == "__main__":
    main()
