"""The command `fastmim pretrain`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of one that comes with fastmim")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="replaces a key of CONFIG, for example data=FOLDER output_dir=FOLDER",
    )


def run(args: argparse.Namespace) -> int:
    """Pretrain a masked autoencoder; run it again to continue after an interruption.

    Writes checkpoints, metrics.jsonl, loss.png and final/model.safetensors into output_dir. Under torchrun each process
    takes its share. `fastmim pretrain quickstart_cpu` needs no data and three minutes of a CPU.
    """
    from ..train import Trainer
    from ..train.config import read

    Trainer(read(args.config, args.settings)).run()
    return 0
