"""The command `fastmim export`."""

import argparse

from .options import add_checkpoint, as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    targets = "facebook", "huggingface", "timm", "videomae"
    parser.add_argument("--to", choices=targets, required=True, help="format to write")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=as_path,
        help="a .pth file (facebook, videomae), a folder (huggingface), a .safetensors file (timm)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights that a run with the setting ema keeps"
    )


def run(args: argparse.Namespace) -> int:
    """Write a model as another library reads it, compare the outputs, and print how to read it."""
    from ..train.export import export, reading
    from ..train.load_run import load_model

    # timm's model has no decoder
    missing = "decoder" if args.to == "timm" else ()
    model = load_model(args.checkpoint, key=args.key, allow_missing=missing, ema=args.ema)
    difference = export(model, args.to, args.out)
    print(f"{args.out}: outputs equal (largest difference {difference:.0e} of the largest output)")
    if code := reading(model, args.to, args.out):
        print(f"read it with: {code}")
    return 0
