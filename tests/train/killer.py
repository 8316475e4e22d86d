"""Kills runs at random moments: python killer.py CONFIG KILLS.

A run is a fork of this process, so that a kill costs no start of Python. Each is killed at a moment drawn from as long
as the undisturbed first one took, its start included; one that ends before that is finished, and the next begins anew.
Prints the folders of finished runs, the undisturbed one first, and how many kills left a half-written checkpoint.
"""

import dataclasses
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from fastmim.train import Config, Trainer
from fastmim.train.config import read

# what runs import late
for name in ("matplotlib.figure", "PIL.Image", "safetensors.torch", "tensorboard.summary.writer.record_writer", "tqdm"):
    importlib.import_module(name)


def start(config: Config) -> int:
    """Run in a child; what it says is appended to a file beside its folder."""
    child = os.fork()
    if child:
        return child
    said = os.open(f"{config.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 1
    try:
        Trainer(config).run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(child: int, config: Config) -> bool:
    """Whether it was killed; else it finished."""
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        sys.exit(Path(f"{config.output_dir}.log").read_text())
    return status != 0


def main() -> None:
    config, kills = read(sys.argv[1]), int(sys.argv[2])

    def numbered() -> Config:
        return dataclasses.replace(config, output_dir=f"{config.output_dir}-{len(finished)}")

    finished: list[str] = []
    killed = saving = 0
    began = time.monotonic()
    end(start(numbered()), numbered())
    seconds = time.monotonic() - began
    finished.append(numbered().output_dir)
    draw = random.Random(0)
    while True:
        child = start(numbered())
        if killed < kills:
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        if end(child, numbered()):
            killed += 1
            saving += any(path.suffix == ".tmp" for path in Path(numbered().output_dir).glob("checkpoints/*"))
            continue
        finished.append(numbered().output_dir)
        if killed == kills:
            break
    print(json.dumps({"finished": finished, "saving": saving, "seconds": seconds}))


main()
