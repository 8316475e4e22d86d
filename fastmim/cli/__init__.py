"""The `fastmim` command, also `python -m fastmim`.

Each command is a module here and an entry in COMMANDS. Its `run` imports what it needs beyond argparse.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from . import (
    check_data_command,
    evaluate_command,
    export_command,
    pack_command,
    plan_command,
    pretrain_command,
    reconstruct_command,
    report_command,
    stats_command,
    status_command,
)


class Command(Protocol):
    """A module with a command."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return the exit status. The docstring is the help: its first line, then all of it."""


COMMANDS: dict[str, Command] = {
    "pack": pack_command,
    "check-data": check_data_command,
    "stats": stats_command,
    "plan": plan_command,
    "pretrain": pretrain_command,
    "status": status_command,
    "report": report_command,
    "reconstruct": reconstruct_command,
    "evaluate": evaluate_command,
    "export": export_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a ValueError, RuntimeError or OSError becomes one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="fastmim",
        description="Masked-autoencoder pretraining that computes only the patches it keeps or predicts.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, module in COMMANDS.items():
        description = module.run.__doc__ or ""
        command = commands.add_parser(name, help=description.splitlines()[0], description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments before or after options, not on both sides
    settings = [text for text in rest if "=" in text and not text.startswith("-")]
    if rest and (settings != rest or not hasattr(args, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if settings:
        args.settings = [*args.settings, *settings]
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("fastmim: interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"fastmim: {error}", file=sys.stderr)
        return 1
    return status
