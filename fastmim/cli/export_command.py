"""The command `fastmim export`."""

import argparse

from .options import add_checkpoint, as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--to", choices=("facebook", "huggingface", "timm"), required=True, help="format to write")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=as_path,
        help="a .pth file (facebook), a folder (huggingface), a .safetensors file (timm)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights that a run with the setting ema keeps"
    )


def run(args: argparse.Namespace) -> int:
    """Write a model as facebookresearch/mae, Hugging Face or timm read it, and compare the outputs."""
    from ..train.export import export
    from ..train.load_run import load_model

    # timm's model has no decoder
    missing = "decoder" if args.to == "timm" else ()
    model = load_model(args.checkpoint, key=args.key, allow_missing=missing, ema=args.ema)
    difference = export(model, args.to, args.out)
    print(f"{args.out}: outputs equal (largest difference {difference:.0e} of the largest output)")
    return 0
