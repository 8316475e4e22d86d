"""Command line of throughput.py."""

import argparse
from pathlib import Path

import torch

from fastmim.data.decoders import BACKENDS, installed
from pictures.photographs import Photographs
from rivals.contestants import DTYPES, PEERS
from rivals.sizes import Cell
from rivals.systems import SYSTEMS

DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
DEFAULT_STEPS = {"cpu": 3, "cuda": 20}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse arguments, fill in every default, and add `cells`, by model, and `pictures`.

    An argument that can't be served ends the program with its name, its value and what is allowed.
    """
    parser = argparse.ArgumentParser(description="Trains masked autoencoders beside their peers; see the README.")
    add = parser.add_argument
    add("--models", nargs="+", choices=SYSTEMS, default=["base"], help="default: base")
    add("--mask-ratios", nargs="+", type=float, metavar="R", help="shares of the patches that are removed")
    add("--decode-ratios", nargs="+", type=float, metavar="Q", help="shares of the removed that are predicted")
    add("--batch-size", type=_batch_size, metavar="N|auto", help="default: auto, which is 8 on a CPU, 2 of clips")
    add("--image-size", type=positive, metavar="N", help="default: 224, 256 of pixio")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda if there is one")
    add("--dtype", choices=DTYPES, help="default: bf16 (by autocast) on cuda, fp32 on a CPU")
    add("--compile", action="store_true", help="run every contestant under torch.compile too")
    add("--peers", nargs="+", choices=PEERS, default=PEERS, help="default: all; plain-gather runs always")
    add("--accelerated", action="store_true", help="peers that fastmim.accelerate() serves, beside themselves")
    add("--data", metavar="DIR", help="folder of images; default: those inside scikit-image and scikit-learn")
    loaders = ("auto", *BACKENDS)
    add("--loader", nargs="?", const="auto", choices=loaders, help="then feed fastmim by a loader of JPEGs too")
    add("--steps", type=positive, metavar="N", help="clocked rounds; default: 3 on a CPU, 20 on cuda")
    add("--full", action="store_true", help="the whole grid, compiled contestants, peak memory")
    add("--json", type=Path, metavar="FILE", help="write environment and rows")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be auto or cpu where torch finds no CUDA device, got cuda")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"argument --json: must be a file in a folder that exists, got {str(args.json)!r}")
    if args.loader not in (None, "auto") and not installed(args.loader):
        parser.error(f"argument --loader: must be an installed backend, got {args.loader}")
    args.dtype = args.dtype or DEFAULT_DTYPE[args.device]
    args.steps = args.steps or DEFAULT_STEPS[args.device]
    args.compile |= args.full
    args.peers = [peer for peer in PEERS if peer in (*args.peers, "plain-gather")]
    try:
        args.cells = {model: _cells(model, args) for model in args.models}
        args.pictures = Photographs(args.data)
    except ValueError as error:
        parser.error(str(error))
    return args


def _cells(model: str, args: argparse.Namespace) -> list[Cell]:
    """Return the cells of a model's table; ratios that are given span a grid of their own."""
    system = SYSTEMS[model]
    if args.loader and system.draw is not None:
        raise ValueError(f"argument --loader: must not be given with {model}, whose masks are drawn outside the clock")
    cells = list(system.full_cells if args.full and system.full_cells else system.cells)
    if args.mask_ratios or args.decode_ratios:
        first = system.cells[0]
        cells = [Cell(r, q) for r in args.mask_ratios or [first.mask_ratio] for q in args.decode_ratios or [1.0]]
    for cell in cells:
        if not 0 < cell.mask_ratio < 1:
            raise ValueError(f"argument --mask-ratios: must be between 0 and 1, got {cell.mask_ratio:g}")
        if not 0 < cell.decode_ratio <= 1:
            raise ValueError(f"argument --decode-ratios: must be above 0 and at most 1, got {cell.decode_ratio:g}")
    size = args.image_size or system.image_size
    if size % system.multiple:
        raise ValueError(f"argument --image-size: must be a multiple of {model}'s {system.multiple}, got {size}")
    for cell in cells:
        try:
            system.check(size, cell)
        except ValueError as error:
            raise ValueError(f"arguments --mask-ratios and --decode-ratios: {model}: {error}") from None
    return cells


def positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return number


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else positive(text)
