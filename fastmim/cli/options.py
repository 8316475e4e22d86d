"""Arguments that several commands share, and their types."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..data.remote import is_url
from ..data.threads import available_cpus

SOURCE = (
    "a folder of images (its subfolders are classes), a .tar file or a folder of them as WebDataset writes them, their "
    "URLs, Parquet files, a folder of save_to_disk, a .txt file of pairs, or a packed dataset"
)
CHECKPOINT = "the output_dir of a run, one of its checkpoints, or any checkpoint that fastmim.load reads"


def as_count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return number


def as_seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 up, got {text!r}")
    return int(text)


def as_path(text: str) -> Path:
    """Return a path with `~` expanded, which shells leave in quotes and after an equals sign."""
    return Path(os.path.expanduser(text))


def as_source(text: str) -> str | Path:
    """Return a URL as it is, or a path."""
    return text if is_url(text) else as_path(text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=as_count, default=available_cpus(), metavar="N", help="default: all CPUs")


def add_arrays(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add the options that say how arrays lie in files."""
    parser.add_argument("--axes", type=as_count, metavar="N", help=f"{of}axes beside the channels. Default: 2")
    parser.add_argument(
        "--channels-last", action="store_true", help=f"{of}the channels are the last axis, not the first"
    )
    parser.add_argument("--key", help=f"{of}name of the array in files that hold several")
    parser.add_argument(
        "--nodata",
        type=float,
        metavar="VALUE",
        help=f"{of}value of missing data, or nan; --nodata=-3e38 where it has an exponent",
    )
    parser.add_argument(
        "--sample-axis", type=int, metavar="AXIS", help=f"{of}axis, from 0, along which a file holds many samples"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=as_path, help=CHECKPOINT)
    parser.add_argument(
        "--key", help="key in the file under which the model is; the rest is ignored. Default: the whole file"
    )


def crops_of(source: Any, args: argparse.Namespace) -> Any:
    """Return how the arrays of a source are read."""
    from ..data.array_crops import ArrayCrops
    from ..data.array_loader import settled
    from ..data.patch_shards import PatchShards

    axes = args.axes or (source.axes if isinstance(source, PatchShards) else 2)
    # patches matter to crops alone
    return settled(source, ArrayCrops(axes, args.channels_last, patch=(1,) * axes, nodata=args.nodata))
