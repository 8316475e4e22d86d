"""The `fastmim` command: one sub-command per job.

A sub-command is a function here and an entry in COMMANDS; what it needs beyond argparse it imports itself.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .data.loader import available_cpus
from .data.quarantine import NAME, Quarantine
from .data.sources import open_source

SOURCE = (
    "a folder of images (its subfolders are classes), a .tar file or a folder of them as WebDataset writes them, "
    "or a packed dataset"
)


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return number


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_count, default=available_cpus(), metavar="N", help="default: all CPUs")


# ---- pack ------------------------------------------------------------------------------------------------------------


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write: new, or of an interrupted run")
    parser.add_argument(
        "--short-side", type=_count, default=256, metavar="PIXELS", help="shrink to it; smaller stay. Default: 256"
    )
    _add_threads(parser)


def _pack(args: argparse.Namespace) -> int:
    """Decode all images once, so that training decodes no JPEG.

    Writes uint8 shards that are mapped into memory, with checksums and labels: about 260 KB an image at --short-side
    256. Give OUT to ImageLoader, or to another command, as the source. Run it again after an interruption: it goes on.
    """
    from tqdm import tqdm

    from .data.pack import pack

    total = len(open_source(args.source).names)
    with tqdm(total=total, desc="packing", unit=" images", disable=None) as bar:
        packed = pack(args.source, args.out, short_side=args.short_side, num_threads=args.threads, progress=bar.update)
    bad = len(packed.reasons)
    print(f"{args.out}: {total - bad} images" + (f"; {bad} can't be read: {args.out / NAME}" if bad else ""))
    return 0


# ---- check-data ------------------------------------------------------------------------------------------------------


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument(
        "--quarantine", type=Path, metavar="FILE", help=f"list what is bad here. Default: {NAME} in SOURCE"
    )
    _add_threads(parser)


def _check_data(args: argparse.Namespace) -> int:
    """Decode every image in full and say which can't be read, before a training run meets them.

    Bad images are printed and listed in a quarantine file with the reason; the exit status is then 1. Training skips
    them. Of a packed dataset all checksums are compared.
    """
    from tqdm import tqdm

    from .data.pack import check

    source = open_source(args.source)
    quarantine = Quarantine(args.quarantine or source.root / NAME, len(source.names))
    found = tqdm(
        check(args.source, num_threads=args.threads), "checking", len(source.names), unit=" images", disable=None
    )
    for sample, (name, reason) in enumerate(found):
        if reason is not None:
            quarantine.add(sample, name, reason)
    bad = len(quarantine.reasons)
    print(f"{args.source}: {len(source.names)} images, {bad} can't be read" + (f": {quarantine.path}" if bad else ""))
    return 1 if bad else 0


# ---- the command -----------------------------------------------------------------------------------------------------

# name: what adds its arguments, what runs it and returns the exit status; its docstring is its help
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "pack": (_add_pack, _pack),
    "check-data": (_add_check_data, _check_data),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; a ValueError, RuntimeError or OSError becomes one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="fastmim", description="Fast masked autoencoder pretraining: pay only for the patches you look at."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, (add_arguments, run) in COMMANDS.items():
        said = run.__doc__ or ""
        command = commands.add_parser(name, help=said.splitlines()[0], description=said)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("fastmim: interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"fastmim: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
