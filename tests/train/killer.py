"""Kill runs at random moments: python killer.py CONFIG KILLS.

A run is a fork of this process, so that no kill costs a start of Python. Each is killed at a random moment within the
time that the first, uninterrupted run took; a run that ends earlier is finished, and the next one starts in a new
folder. Prints the folders of finished runs, the uninterrupted one first, and the number of kills that left a partial
checkpoint.
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

# imported late by runs
for name in ("matplotlib.figure", "PIL.Image", "safetensors.torch", "tensorboard.summary.writer.record_writer", "tqdm"):
    importlib.import_module(name)


def start(config: Config) -> int:
    """Start a run in a child process, its output appended to a file beside its folder."""
    child = os.fork()
    if child:
        return child
    log = os.open(f"{config.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
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
    """Wait for a run; return whether it was killed, else it has finished."""
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
