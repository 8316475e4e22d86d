"""The command `fastmim stats`."""

import argparse

from .options import add_arrays, add_threads, as_path, crops_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=as_path, help="a folder of arrays, as ArrayLoader reads them")
    add_arrays(parser)
    parser.add_argument("--out", type=as_path, metavar="FILE", help="the file to write. Default: stats.json in SOURCE")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the mean and standard deviation of each channel of arrays, over all values in one pass.

    The result is computed in float64, printed, and written to a JSON file. The same command continues after an
    interruption. Arrays that can't be read are listed in the quarantine file, and the exit status is then 1.
    """
    from tqdm import tqdm

    from ..data.array_files import open_arrays
    from ..data.stats import measure

    source = open_arrays(args.source, args.key, args.sample_axis)
    with tqdm(total=len(source.names), desc="measuring", unit=" arrays", disable=None) as bar:
        found = measure(source, crops_of(source, args), args.out, num_threads=args.threads, progress=bar.update)
    mean, std = found.moments.mean.tolist(), found.moments.std.tolist()
    print(f"{args.source}: {found.done} arrays, {len(found.skipped)} can't be read")
    print(f"mean={mean}\nstd={std}")
    most = {"uint8": 255, "uint16": 65535}.get(found.layout.dtype)
    if most is not None:
        print(f"for a model that takes {found.layout.dtype}:")
        print(f"mean={[value / most for value in mean]}\nstd={[value / most for value in std]}")
    return 1 if found.skipped else 0
