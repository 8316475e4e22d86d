"""The command `fastmim pack`."""

import argparse
from collections.abc import Collection

from ..data.quarantine import NAME
from ..data.sources import open_source
from .options import SOURCE, add_arrays, add_threads, as_count, as_path, as_source


def _sizes(text: str) -> list[int]:
    return [as_count(size) for size in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=as_source, help=SOURCE)
    parser.add_argument("out", metavar="OUT", type=as_path, help="the folder to write: new, or of an earlier run")
    parser.add_argument(
        "--short-side",
        type=as_count,
        default=256,
        metavar="PIXELS",
        help="length to which the shorter side is reduced; smaller images keep their size. Default: 256",
    )
    parser.add_argument(
        "--patch-size",
        type=_sizes,
        metavar="N[,N...]",
        help="SOURCE holds arrays, as ArrayLoader reads them: store them in patches of this size, one per axis or one "
        "for all",
    )
    add_arrays(parser, "with --patch-size, ")
    parser.add_argument(
        "--frame-stride",
        type=as_count,
        metavar="N",
        help="SOURCE holds videos, as ClipLoader reads them: store every N-th frame, by default in patches of 2,16,16",
    )
    parser.add_argument(
        "--clip-length", type=as_count, metavar="N", help="with --frame-stride, most frames to store, from the middle"
    )
    add_threads(parser)


def _packed(args: argparse.Namespace, reasons: Collection[int], total: int, noun: str) -> int:
    """Print what was packed, and return the exit status."""
    bad = len(reasons)
    print(f"{args.out}: {total - bad} {noun}" + (f"; {bad} can't be read: {args.out / NAME}" if bad else ""))
    return 0


def _pack_videos(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..data.clip_files import open_videos
    from ..data.clip_pack import pack_videos

    if args.frame_stride is None:
        raise ValueError("--clip-length needs --frame-stride, which packs videos")
    total = len(open_videos(args.source).names)
    options = {"short_side": args.short_side, "frame_stride": args.frame_stride, "clip_length": args.clip_length}
    if args.patch_size is not None:
        options["patch_size"] = args.patch_size
    with tqdm(total=total, desc="packing", unit=" videos", disable=None) as bar:
        packed = pack_videos(args.source, args.out, **options, num_threads=args.threads, progress=bar.update)
    return _packed(args, packed.reasons, total, "videos")


def run(args: argparse.Namespace) -> int:
    """Decode all images once, so that training decodes no JPEG; with --patch-size, store arrays in patches.

    Writes uint8 shards that are mapped into memory, with checksums and labels: about 260 KB an image at --short-side
    256. Give OUT to ImageLoader, or to another command, as the source. The same command continues after an
    interruption. On a finished dataset it packs the files that were repaired or changed since.

    Arrays keep their values, without what lies beyond the last whole patch of an axis. Each patch has a checksum and is
    one contiguous read, so that ArrayLoader reads in proportion to the patches that a mask keeps or predicts.
    Videos, with --frame-stride, are decoded once and stored likewise, for ClipLoader.
    """
    if args.frame_stride is not None or args.clip_length is not None:
        return _pack_videos(args)
    from tqdm import tqdm

    if args.patch_size is not None:
        return _pack_arrays(args)
    from ..data.pack import pack

    total = len(open_source(args.source).names)
    with tqdm(total=total, desc="packing", unit=" images", disable=None) as bar:
        packed = pack(args.source, args.out, short_side=args.short_side, num_threads=args.threads, progress=bar.update)
    return _packed(args, packed.reasons, total, "images")


def _pack_arrays(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..data.array_files import open_arrays
    from ..data.pack_arrays import pack_arrays

    several = len(args.patch_size) > 1
    total = len(open_arrays(args.source, args.key, args.sample_axis).names)
    with tqdm(total=total, desc="packing", unit=" arrays", disable=None) as bar:
        packed = pack_arrays(
            args.source,
            args.out,
            patch_size=args.patch_size if several else args.patch_size[0],
            axes=args.axes or (len(args.patch_size) if several else 2),
            channels_last=args.channels_last,
            key=args.key,
            sample_axis=args.sample_axis,
            nodata=args.nodata,
            num_threads=args.threads,
            progress=bar.update,
        )
    return _packed(args, packed.reasons, total, "arrays")
