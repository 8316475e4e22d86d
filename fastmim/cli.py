"""The `fastmim` command, also `python -m fastmim`.

Each sub-command is a function here and an entry in COMMANDS, and imports what it needs beyond argparse.
"""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from .data.formats import describe
from .data.quarantine import NAME, Quarantine, listing_of
from .data.remote import is_url
from .data.sources import open_source
from .data.threads import available_cpus

SOURCE = (
    "a folder of images (its subfolders are classes), a .tar file or a folder of them as WebDataset writes them, their "
    "URLs, Parquet files, a folder of save_to_disk, a .txt file of pairs, or a packed dataset"
)


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return number


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 up, got {text!r}")
    return int(text)


def _path(text: str) -> Path:
    """Return a path with `~` expanded, which shells leave in quotes and after an equals sign."""
    return Path(os.path.expanduser(text))


def _source(text: str) -> str | Path:
    """Return a URL as it is, or a path."""
    return text if is_url(text) else _path(text)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_count, default=available_cpus(), metavar="N", help="default: all CPUs")


def _sizes(text: str) -> list[int]:
    return [_count(size) for size in text.split(",")]


def _add_arrays(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add the options that say how arrays lie in files."""
    parser.add_argument("--axes", type=_count, metavar="N", help=f"{of}axes beside the channels. Default: 2")
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


def _crops(source: Any, args: argparse.Namespace) -> Any:
    """Return how the arrays of a source are read."""
    from .data.array_crops import ArrayCrops
    from .data.array_loader import settled
    from .data.patch_shards import PatchShards

    axes = args.axes or (source.axes if isinstance(source, PatchShards) else 2)
    # patches matter to crops alone
    return settled(source, ArrayCrops(axes, args.channels_last, patch=(1,) * axes, nodata=args.nodata))


# ---- pack ------------------------------------------------------------------------------------------------------------


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=_source, help=SOURCE)
    parser.add_argument("out", metavar="OUT", type=_path, help="the folder to write: new, or of an earlier run")
    parser.add_argument(
        "--short-side",
        type=_count,
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
    _add_arrays(parser, "with --patch-size, ")
    parser.add_argument(
        "--frame-stride",
        type=_count,
        metavar="N",
        help="SOURCE holds videos, as ClipLoader reads them: store every N-th frame, by default in patches of 2,16,16",
    )
    parser.add_argument(
        "--clip-length", type=_count, metavar="N", help="with --frame-stride, most frames to store, from the middle"
    )
    _add_threads(parser)


def _packed(args: argparse.Namespace, reasons: Collection[int], total: int, noun: str) -> int:
    """Print what was packed, and return the exit status."""
    bad = len(reasons)
    print(f"{args.out}: {total - bad} {noun}" + (f"; {bad} can't be read: {args.out / NAME}" if bad else ""))
    return 0


def _pack_videos(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .data.clip_files import open_videos
    from .data.clip_pack import pack_videos

    if args.frame_stride is None:
        raise ValueError("--clip-length needs --frame-stride, which packs videos")
    total = len(open_videos(args.source).names)
    options = {"short_side": args.short_side, "frame_stride": args.frame_stride, "clip_length": args.clip_length}
    if args.patch_size is not None:
        options["patch_size"] = args.patch_size
    with tqdm(total=total, desc="packing", unit=" videos", disable=None) as bar:
        packed = pack_videos(args.source, args.out, **options, num_threads=args.threads, progress=bar.update)
    return _packed(args, packed.reasons, total, "videos")


def _pack(args: argparse.Namespace) -> int:
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
    from .data.pack import pack

    total = len(open_source(args.source).names)
    with tqdm(total=total, desc="packing", unit=" images", disable=None) as bar:
        packed = pack(args.source, args.out, short_side=args.short_side, num_threads=args.threads, progress=bar.update)
    return _packed(args, packed.reasons, total, "images")


def _pack_arrays(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .data.array_files import open_arrays
    from .data.pack_arrays import pack_arrays

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


# ---- check-data ------------------------------------------------------------------------------------------------------


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=_source, help=SOURCE)
    parser.add_argument(
        "--quarantine", type=_path, metavar="FILE", help=f"the file that lists them. Default: {NAME} in SOURCE"
    )
    parser.add_argument("--videos", action="store_true", help="SOURCE holds videos, as ClipLoader reads them")
    parser.add_argument("--arrays", action="store_true", help="SOURCE holds arrays, as ArrayLoader reads them")
    _add_arrays(parser, "with --arrays, ")
    _add_threads(parser)


def _check_data(args: argparse.Namespace) -> int:
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

    from .data.check_data import DAMAGED, DIM, UNREADABLE, check_source, check_videos
    from .data.clip_files import open_videos
    from .data.decoders import installed
    from .data.packed import Packed

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

    from .data.array_files import open_arrays
    from .data.check_arrays import check_arrays, summary

    source = open_arrays(args.source, args.key, args.sample_axis)
    quarantine = Quarantine(args.quarantine or source.root / NAME, len(source.names))
    checked = check_arrays(source, _crops(source, args), num_threads=args.threads)
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


# ---- stats -----------------------------------------------------------------------------------------------------------


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=_path, help="a folder of arrays, as ArrayLoader reads them")
    _add_arrays(parser)
    parser.add_argument("--out", type=_path, metavar="FILE", help="the file to write. Default: stats.json in SOURCE")
    _add_threads(parser)


def _stats(args: argparse.Namespace) -> int:
    """Measure the mean and standard deviation of each channel of arrays, over all values in one pass.

    The result is computed in float64, printed, and written to a JSON file. The same command continues after an
    interruption. Arrays that can't be read are listed in the quarantine file, and the exit status is then 1.
    """
    from tqdm import tqdm

    from .data.array_files import open_arrays
    from .data.stats import measure

    source = open_arrays(args.source, args.key, args.sample_axis)
    with tqdm(total=len(source.names), desc="measuring", unit=" arrays", disable=None) as bar:
        found = measure(source, _crops(source, args), args.out, num_threads=args.threads, progress=bar.update)
    mean, std = found.moments.mean.tolist(), found.moments.std.tolist()
    print(f"{args.source}: {found.done} arrays, {len(found.skipped)} can't be read")
    print(f"mean={mean}\nstd={std}")
    most = {"uint8": 255, "uint16": 65535}.get(found.layout.dtype)
    if most is not None:
        print(f"for a model that takes {found.layout.dtype}:")
        print(f"mean={[value / most for value in mean]}\nstd={[value / most for value in std]}")
    return 1 if found.skipped else 0


# ---- pretrain --------------------------------------------------------------------------------------------------------


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of one that comes with fastmim")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="replaces a key of CONFIG, for example data=FOLDER output_dir=FOLDER",
    )


def _pretrain(args: argparse.Namespace) -> int:
    """Pretrain a masked autoencoder; run it again to continue after an interruption.

    Writes checkpoints, metrics.jsonl, loss.png and final/model.safetensors into output_dir. Under torchrun each process
    takes its share. `fastmim pretrain quickstart_cpu` needs no data and three minutes of a CPU.
    """
    from .train import Trainer
    from .train.config import read

    Trainer(read(args.config, args.settings)).run()
    return 0


# ---- status ----------------------------------------------------------------------------------------------------------


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="RUN", type=_path, help="the output_dir of a run, also one on another machine"
    )


def _status(args: argparse.Namespace) -> int:
    """Show how far a run is: step, speed, loss curve, checkpoint, skipped updates, estimated end, and if it is alive.

    Reads the run's folder only, so it works from any machine that sees the folder. If the process that trains is not on
    this machine, it waits up to 20 seconds for a sign of life.
    """
    import shutil

    from .train.status import describe, read_status

    print(describe(read_status(args.folder), width=shutil.get_terminal_size().columns))
    return 0


# ---- reconstruct -----------------------------------------------------------------------------------------------------

CHECKPOINT = "the output_dir of a run, one of its checkpoints, or any checkpoint that fastmim.load reads"


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=_path, help=CHECKPOINT)
    parser.add_argument(
        "--key", help="key in the file under which the model is; the rest is ignored. Default: the whole file"
    )


def _add_reconstruct(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("images", metavar="IMAGES", type=_path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("-o", "--out", metavar="PNG", type=_path, required=True, help="the grid to write")
    parser.add_argument(
        "--mask-ratio", type=float, default=0.75, metavar="R", help="share of the patches to remove. Default: 0.75"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the masks. Default: 0")
    parser.add_argument("--count", type=_count, default=16, metavar="N", help="limit of pictures. Default: 16")


def _reconstruct(args: argparse.Namespace) -> int:
    """Draw the visible patches, the reconstruction and the original of pictures side by side, a row for each."""
    import torch

    from . import masking
    from .data.seeds import mask_seeds
    from .train.evaluate import check_takes_pictures
    from .train.load_run import load_model
    from .train.reconstruct import draw_grid, find_images, read_images
    from .train.registry import takes_pairs

    model = load_model(args.checkpoint, key=args.key).eval()
    check_takes_pictures(model, "reconstruct")
    if takes_pairs(model):
        raise ValueError(f"reconstruct has one view of a picture, and this {type(model).__name__} needs two")
    height, width = model.img_size
    images = read_images(find_images(args.images, args.count), (height, width))
    seeds = mask_seeds(args.seed, 0, torch.arange(len(images)))
    mask = masking.random(len(images), model.num_patches, args.mask_ratio, seeds=seeds)
    with torch.no_grad():
        out = model(images, mask=mask)
    draw_grid(model, images, out, args.out)
    print(f"{args.out}: visible | reconstruction | original of {len(images)} images, loss {out.loss.item():.4f}")
    return 0


# ---- evaluate --------------------------------------------------------------------------------------------------------


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "data", metavar="DATA", type=_path, help="a folder of class folders, or of train and test folders of them"
    )
    parser.add_argument(
        "--labels-per-class", type=_count, metavar="N", help="training images of each class. Default: all"
    )
    parser.add_argument("--pool", choices=("mean", "class"), default="mean", help="pooling of tokens. Default: mean")
    _add_threads(parser)


def _evaluate(args: argparse.Namespace) -> int:
    """Classify images by frozen features, with 20 nearest neighbours and with a linear probe.

    The accuracies are printed beside those of a random encoder of the same shape and of raw pixels, and explained.
    """
    import copy

    import torch

    from .train.evaluate import check_takes_pictures, compare, explain, read_split
    from .train.load_run import load_model

    # features need the encoder alone
    model = load_model(args.checkpoint, key=args.key, allow_missing="decoder").eval()
    check_takes_pictures(model, "evaluate")
    height, width = model.img_size
    split = read_split(args.data, (height, width), args.threads)
    torch.manual_seed(0)
    untrained = copy.deepcopy(model)
    untrained.initialize_weights()
    rows = compare({"checkpoint": model, "random encoder": untrained}, split, args.labels_per_class, args.pool)
    learnt = len(split.train.labels) if args.labels_per_class is None else f"{args.labels_per_class} a class"
    print(f"{len(split.classes)} classes, {learnt} for training, {len(split.test.labels)} for testing")
    print(explain(rows, split, args.labels_per_class, args.pool))
    return 0


# ---- export ----------------------------------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("--to", choices=("facebook", "huggingface", "timm"), required=True, help="format to write")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=_path,
        help="a .pth file (facebook), a folder (huggingface), a .safetensors file (timm)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights that a run with the setting ema keeps"
    )


def _export(args: argparse.Namespace) -> int:
    """Write a model as facebookresearch/mae, Hugging Face or timm read it, and compare the outputs."""
    from .train.export import export
    from .train.load_run import load_model

    # timm's model has no decoder
    missing = "decoder" if args.to == "timm" else ()
    model = load_model(args.checkpoint, key=args.key, allow_missing=missing, ema=args.ema)
    difference = export(model, args.to, args.out)
    print(f"{args.out}: outputs equal (largest difference {difference:.0e} of the largest output)")
    return 0


# ---- the command -----------------------------------------------------------------------------------------------------

# by name: a function that adds the arguments, and one that runs the command and returns the exit status, whose
# docstring is the help
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "pack": (_add_pack, _pack),
    "check-data": (_add_check_data, _check_data),
    "stats": (_add_stats, _stats),
    "pretrain": (_add_pretrain, _pretrain),
    "status": (_add_status, _status),
    "reconstruct": (_add_reconstruct, _reconstruct),
    "evaluate": (_add_evaluate, _evaluate),
    "export": (_add_export, _export),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; a ValueError, RuntimeError or OSError becomes one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="fastmim",
        description="Masked-autoencoder pretraining that computes only the patches it keeps or predicts.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, (add_arguments, run) in COMMANDS.items():
        description = run.__doc__ or ""
        command = commands.add_parser(name, help=description.splitlines()[0], description=description)
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
