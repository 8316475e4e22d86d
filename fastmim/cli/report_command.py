"""The command `fastmim report`."""

import argparse

from .options import as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=as_path, help="the output_dir of a run")
    parser.add_argument(
        "--to",
        metavar="SERVICE",
        help='"wandb", "mlflow" or "package.module:Class". Default: the setting report_to of the run',
    )
    parser.add_argument(
        "--options",
        metavar="key=value",
        nargs="+",
        default=[],
        help="replace those of the run's report_options, for example project=NAME",
    )


def run(args: argparse.Namespace) -> int:
    """Send the metrics of a run to Weights & Biases or MLflow, as a new run there.

    Sends metrics.jsonl from its first line to its last, so that steps that were repeated after a restart are there
    once. A run with the setting report_to sends each line by itself.
    """
    from ..train.report.resend import resend

    to, run_id, count = resend(args.folder, args.to, args.options)
    print(f"{args.folder}: {count} lines of metrics.jsonl sent to {to} as run {run_id}")
    return 0
