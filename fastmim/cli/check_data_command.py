"""The command `fastmim check-data`."""

import argparse

from ..data.formats import describe
from ..data.quarantine import NAME, Quarantine, listing_of
from ..data.sources import open_source
from .options import SOURCE, add_arrays, add_threads, as_path, as_source, crops_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=as_source, help=SOURCE)
    parser.add_argument(
        "--quarantine", type=as_path, metavar="FILE", help=f"the file that lists them. Default: {NAME} in SOURCE"
    )
    parser.add_argument("--videos", action="store_true", help="SOURCE holds videos, as ClipLoader reads them")
    parser.add_argument("--arrays", action="store_true", help="SOURCE holds arrays, as ArrayLoader reads them")
    add_arrays(parser, "with --arrays, ")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Decode every image in full, and report those that can't be read or are damaged.

    Unreadable images are printed and listed in a quarantine file with the reason, and the exit status is 1; training
    skips them. Training uses images that are damaged but decodable, such as JPEGs with too little data before their end
    mark, and 16-bit images that are nearly black because they use less than 12 bits: both are printed and counted but
    not listed, and the exit status stays 0. Damage in JPEGs is found where simplejpeg is installed. For a packed
    dataset all checksums are compared. With --videos, every frame of each video is decoded.

    With --arrays, every array is read in full. Those that can't be served are listed likewise, also for channels or a
    dtype other than those of the first, NaN without --nodata, and infinity. Sizes, dtypes and the share of missing data
    are printed.
    """
    if args.arrays:
        return _check_arrays(args)
    from collections import Counter

    from tqdm import tqdm

    from ..data.check_data import DAMAGED, DIM, UNREADABLE, check_source, check_videos
    from ..data.clip_files import open_videos
    from ..data.decoders import installed
    from ..data.packed import Packed

    noun, check = ("videos", check_videos) if args.videos else ("images", check_source)
    source = open_videos(args.source) if args.videos else open_source(args.source)
    quarantine = Quarantine(listing_of(source, args.quarantine), len(source.names))
    found = tqdm(
        check(args.source, num_threads=args.threads), "checking", len(source.names), unit=f" {noun}", disable=None
    )
    counts: Counter[str] = Counter()
    for sample, (name, kind, reason) in enumerate(found):
        counts[kind] += 1
        if kind == UNREADABLE:
            quarantine.add(sample, name, reason)
            continue
        quarantine.remove(sample, name)
        if kind:
            found.write(f"{kind}: {name!a}: {reason}")
    bad = counts[UNREADABLE]
    listing = f", {quarantine.listing()}" if bad else ""
    print(f"{args.source}: {len(source.names)} {noun}, {bad} can't be read{listing}")
    if not args.videos and not isinstance(source, Packed):
        print(f"served: {counts[DAMAGED]} damaged but decodable, {counts[DIM]} of 16 bits that use less than 12")
        if not installed("simplejpeg"):
            print("damage in JPEGs wasn't looked for: pip install 'fastmim[jpeg]'")
    if source.left_out:
        print(f"left out: {describe(source.left_out)}")
    return 1 if bad else 0


def _check_arrays(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..data.array_files import open_arrays
    from ..data.check_arrays import check_arrays, summary

    source = open_arrays(args.source, args.key, args.sample_axis)
    quarantine = Quarantine(args.quarantine or source.root / NAME, len(source.names))
    checked = check_arrays(source, crops_of(source, args), num_threads=args.threads)
    findings = list(tqdm(checked, "checking", len(source.names), unit=" arrays", disable=None))
    for sample, found in enumerate(findings):
        if found.reason:
            quarantine.add(sample, found.name, found.reason)
        else:
            quarantine.remove(sample, found.name)
    bad = len(quarantine.reasons)
    listing = f", {quarantine.listing()}" if bad else ""
    print(f"{args.source}: {len(source.names)} arrays, {bad} can't be served{listing}\n{summary(findings)}")
    if source.left_out:
        print(f"left out: {describe(source.left_out)}")
    return 1 if bad else 0
