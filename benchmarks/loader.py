"""Measure each loading backend, a torch DataLoader with Pillow, and batches in memory for comparison.

All run in one process, interleaved: in each round every one of them yields one epoch. Only the DataLoader has worker
processes. Packed images are also read by patches of 16 pixels. For each of fastmim's rows the pixels that both passes
of resampling compute and the bytes of a batch are counted, as shares of those of packed whole crops.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import torch
from tqdm import tqdm

from fastmim import _backends, masking
from fastmim.data import Batch, ImageLoader, PatchBatch
from fastmim.data.decoders import BACKENDS, installed
from fastmim.data.pack import pack
from fastmim.data.threads import available_cpus
from harness import machine
from harness.timing import interleave, spread
from pictures.jpegs import write_jpegs
from pictures.photographs import Photographs
from rivals import clips
from rivals.arguments import positive
from rivals.recipe import recipe

RECIPE, PACKED, MEMORY = "torch DataLoader, Pillow, float", "packed", "from memory"
PATCH = 16
# mask ratio and decode ratio of rows that read patches
PATCHWISE = (0.9, 0.25), (0.98, 0.1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, help="folder of JPEGs; default: ImageNet-sized ones are made")
    add("--images", type=positive, default=512, metavar="N", help="how many are made. Default: 512")
    add("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    add("--image-size", type=positive, default=224, metavar="N", help="default: 224")
    add("--threads", type=positive, default=available_cpus(), metavar="N", help="and of workers. Default: all CPUs")
    add("--rounds", type=positive, default=5, metavar="N", help="timed epochs of each. Default: 5")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the batches. Default: cpu")
    add("--videos", action="store_true", help="measure clips of videos of 10 s, --images of them, instead")
    add("--json", type=Path, metavar="FILE", help="write environment and rows")
    args = parser.parse_args(argv)
    if args.data and not any(args.data.rglob("*.jpg")):
        parser.error(f"argument --data: must be a folder of .jpg files, got {str(args.data)!r}")
    if args.videos and (args.data or args.device != "cpu"):
        parser.error("argument --videos: makes its own videos, and measures on the CPU; got --data or --device")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be cpu where torch finds no CUDA device, got cuda")
    return args


def measure(args: argparse.Namespace, folder: Path, packed: Path) -> list[dict[str, Any]]:
    """Return a row of figures for each way of loading."""
    options = {"image_size": args.image_size, "num_threads": args.threads, "device": args.device}
    epochs: dict[str, Iterable[Any]] = {RECIPE: recipe(folder, args.batch_size, args.image_size, args.threads)}
    for backend in reversed(BACKENDS):
        if installed(backend):
            epochs[backend] = ImageLoader(folder, args.batch_size, backend=backend, **options)
    epochs[PACKED] = ImageLoader(packed, args.batch_size, **options)
    for ratios in PATCHWISE:
        draw = masks((args.image_size // PATCH) ** 2, *ratios)
        name = "{}, patches at {:g}/{:g}".format(PACKED, *ratios)
        epochs[name] = ImageLoader(packed, args.batch_size, patch_size=PATCH, masking=draw, **options)
    batches = [batch.images for batch in ImageLoader(packed, args.batch_size, **options)]
    epochs[MEMORY] = Memory(torch.cat(batches), args.batch_size)
    images = len(batches) * args.batch_size
    with tqdm(total=len(epochs) * (1 + args.rounds), desc="loading", leave=False) as bar:

        def visitor(epoch: Iterable[Any]) -> Callable[[int], None]:
            def visit(_: int) -> None:
                for batch in epoch:
                    for tensor in tensors(batch):
                        tensor.to(args.device)
                bar.update()

            return visit

        laps = interleave({name: visitor(epoch) for name, epoch in epochs.items()}, 1 + args.rounds, args.device)
    theirs = laps[RECIPE][1:]
    counts = {name: counted(epoch) for name, epoch in epochs.items() if isinstance(epoch, ImageLoader)}
    return [
        {
            "backend": name,
            "images_per_second": images / median(seconds[1:]),
            "ratio": median(their / our for their, our in zip(theirs, seconds[1:])),
            "seconds_all": seconds[1:],
            **{
                f"share_of_{what}": count / whole
                for what, count, whole in zip(("pixels", "bytes"), counts.get(name, ()), counts[PACKED])
            },
        }
        for name, seconds in laps.items()
    ]


def masks(patches: int, mask_ratio: float, decode_ratio: float) -> Callable[[torch.Tensor], masking.Mask]:
    """Return a function that draws masks, of at least one visible patch."""
    kept = max(1, int(patches * (1 - mask_ratio)))

    def draw(seeds: torch.Tensor) -> masking.Mask:
        return masking.random(len(seeds), patches, len_keep=kept, decode_ratio=decode_ratio, seeds=seeds)

    return draw


def tensors(batch: Any) -> list[torch.Tensor]:
    """Return the tensors of a batch that are on its device."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Batch):
        return [batch.images]
    assert isinstance(batch, PatchBatch)
    held = (getattr(of, field.name) for of in (batch.patches, batch.mask) for field in dataclasses.fields(of))
    return [value for value in held if isinstance(value, torch.Tensor)]


def counted(loader: ImageLoader) -> tuple[float, float]:
    """Return the pixels resampled and the bytes yielded for each image of an epoch."""
    made: list[int] = []
    resample = _backends.resample
    if resample is None:
        return float("nan"), float("nan")

    def counting(*args: Any) -> int:
        made.append(resample(*args))
        return made[-1]

    with mock.patch.object(_backends, "resample", counting):
        sizes = [(len(batch.ids), sum(tensor.nbytes for tensor in tensors(batch))) for batch in loader]
    images = sum(count for count, _ in sizes)
    return sum(made) / images, sum(size for _, size in sizes) / images


class Memory:
    """Shuffled batches of images that are already decoded, cropped and resized: an upper bound for any loader."""

    def __init__(self, images: torch.Tensor, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size

    def __iter__(self) -> Any:
        for ids in torch.randperm(len(self.images)).split(self.batch_size):
            yield self.images[ids]


def table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["backend"]) for row in rows)
    lines = [f"{'':<{width}}  images/s     ±  over the first  pixels  bytes"]
    for row in rows:
        lines.append(
            f"{row['backend']:<{width}}  {row['images_per_second']:>8.4g}  {spread(row['seconds_all']):>4.0%}  "
            f"{'×' + format(row['ratio'], '.2f'):>14}  "
            + "  ".join(f"{row[key]:>5.0%}" for key in ("share_of_pixels", "share_of_bytes") if key in row)
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    args = parse(argv)
    environment = machine.environment(args.device)
    with tempfile.TemporaryDirectory() as work:
        folder = args.data or Path(work) / "jpegs"
        if args.videos:
            return report(args, environment, clips.measure(args, Path(work)), clips.table)
        if args.data is None:
            environment["bytes_per_image"] = write_jpegs(folder, args.images, Photographs())
            print(f"{args.images} JPEGs of {environment['bytes_per_image'] / 1e3:.0f} KB on average", flush=True)
        pack(folder, Path(work) / "packed", num_threads=args.threads)
        return report(args, environment, measure(args, folder, Path(work) / "packed"), table)


def report(args: argparse.Namespace, environment: Any, rows: list[dict[str, Any]], table: Callable[..., str]) -> int:
    """Print and write rows; return the exit status."""
    print(f"{machine.describe(environment)}\nbatch {args.batch_size}, {args.threads} threads or workers\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
