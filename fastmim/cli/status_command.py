"""The command `fastmim status`."""

import argparse

from .options import as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="RUN", type=as_path, help="the output_dir of a run, also one on another machine"
    )


def run(args: argparse.Namespace) -> int:
    """Show how far a run is: step, speed, loss curve, checkpoint, skipped updates, estimated end, and if it is alive.

    Reads the run's folder only, so it works from any machine that sees the folder. If the process that trains is not on
    this machine, it waits up to 20 seconds for a sign of life.
    """
    import shutil

    from ..train.status import describe, read_status

    print(describe(read_status(args.folder), width=shutil.get_terminal_size().columns))
    return 0
