"""Measure how long training pauses for the checkpoint of a sharded run, and how long the checkpoint takes to write.

python benchmarks/checkpoint_pause.py [--processes N] [--gigabytes G] [--saves N] [--folder DIR]

Starts processes on the CPU (gloo) that share a ViT-B of as many blocks as make the state (weights and AdamW's moments)
as large as asked, and saves it several times, each save after the one before is written. The pause is the time that
`CheckpointManager.save` takes in the slowest process. The write ends when files and folders are flushed to disk, the
sums are in the manifest and the checkpoint is in its place. The first save also allocates the memory of the copies.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fastmim.train import Config
from fastmim.train.checkpoint.manager import CheckpointManager
from fastmim.train.distributed import Processes, parallelize
from fastmim.train.objective import build
from fastmim.train.schedule import adamw

# bytes of weight and two moments in float32, and weights of a block of ViT-B
BYTES, BLOCK = 12, 7_087_872


class NoLoader:
    """Loader without a state."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure(rank: int, arguments: argparse.Namespace) -> None:
    """Save in one of the processes; the first one prints."""
    torch.set_num_threads(1)
    world = arguments.processes
    store = dist.FileStore(str(arguments.folder / "store"), world)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    processes = Processes(rank, world, torch.device("cpu"))
    depth = max(1, round(arguments.gigabytes * 1e9 / BYTES / BLOCK))
    settings = {"depth": depth, "decoder_depth": 1}
    folder = str(arguments.folder)
    config = Config.of(
        {
            "data": folder,
            "output_dir": folder,
            "model": "base",
            "model_options": settings,
            "parallel": "fsdp",
            "device": "cpu",
            "batch_size": world,
            "max_steps": 1,
            "keep_last": 2,
        }
    )
    objective: Any = build(config.objective, config.objective_options, config.build())
    parallelize(objective, config, processes)
    optimizer = adamw(objective, config)
    loader: Any = NoLoader()
    manager = CheckpointManager(config, processes, objective, optimizer, None, loader, None, print)
    rows = []
    for number in range(arguments.saves):
        dist.barrier()
        began = time.perf_counter()
        manager.save(number, 0, 0)
        paused = time.perf_counter() - began
        manager.writer.wait(strict=True)
        written = time.perf_counter() - began - paused
        rows.append([max(column) for column in zip(*processes.gather((paused, written)))])
    manager.close()
    if rank == 0:
        path = Path(config.output_dir) / "checkpoints" / "latest"
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"{size / 1e9:.2f} GB in {world} processes, {depth + 1} blocks")
        print("save   pause s   write s   pause/write")
        for number, (paused, written) in enumerate(rows):
            print(f"{number:4}{paused:10.3f}{written:10.3f}{paused / written:14.1%}")
        later = [paused / written for paused, written in rows[1:]]
        if later:
            print(f"median after the first: {statistics.median(later):.1%}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to be measured; default: a temporary one")
    arguments = parser.parse_args()
    parent = arguments.folder
    arguments.folder = Path(tempfile.mkdtemp(prefix="checkpoint-pause-", dir=parent))
    try:
        multiprocessing.spawn(measure, (arguments,), arguments.processes)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
