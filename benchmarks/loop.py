"""Compare the pretraining loop with a bare step (forward, backward, optimiser) on the same batches, interleaved.

    python benchmarks/loop.py [CONFIG] [key=value ...] [--rounds N]

The loop's step has masks by sample, the gradient's norm, the check that it is finite, and its share of a line of
metrics; loading and checkpoints, which run in the background, are not part of it.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

import torch

from fastmim.train import Trainer
from fastmim.train.config import read
from fastmim.train.distributed import joined
from fastmim.train.schedule import adamw
from fastmim.train.signals import SignalListener
from harness.timing import interleave, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="quickstart_cpu")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(read(args.config, [*args.settings, f"output_dir={folder}"]))
        config = trainer.config
        with joined(config) as trainer.processes, SignalListener() as trainer.signals:
            trainer._prepare()
            trainer.checkpoints.writer.wait()
            batch = next(iter(trainer.loader))
            images = batch.images.to(trainer.processes.device)
            model = copy.deepcopy(trainer.model)
            optimizer = adamw(model, config)

            def bare(_: int) -> None:
                with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                    loss = model(images, mask_ratio=config.mask_ratio, decode_ratio=config.decode_ratio).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            def loop(_: int) -> None:
                trainer._update(batch)
                if trainer.step % config.log_every == 0:
                    trainer._read_results()

            seconds = interleave({"bare": bare, "loop": loop}, args.rounds + 3, config.device)
            trainer.checkpoints.writer.close()
            trainer.journal.close()
    # the first rounds warm up
    kept = {name: times[3:] for name, times in seconds.items()}
    ratio = median(ours / bare for ours, bare in zip(kept["loop"], kept["bare"]))
    for name, times in kept.items():
        print(f"{name}: {1e3 * median(times):.1f} ms a step, ± {spread(times):.0%}")
    print(f"the loop's step takes {ratio:.3f} of the bare step (median of {args.rounds} pairs)")


if __name__ == "__main__":
    main()
