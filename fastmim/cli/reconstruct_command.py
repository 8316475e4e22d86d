"""The command `fastmim reconstruct`."""

import argparse

from .options import add_checkpoint, as_count, as_path, as_seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("images", metavar="IMAGES", type=as_path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("-o", "--out", metavar="PNG", type=as_path, required=True, help="the grid to write")
    parser.add_argument(
        "--mask-ratio", type=float, default=0.75, metavar="R", help="share of the patches to remove. Default: 0.75"
    )
    parser.add_argument("--seed", type=as_seed, default=0, metavar="N", help="seed of the masks. Default: 0")
    parser.add_argument("--count", type=as_count, default=16, metavar="N", help="limit of pictures. Default: 16")


def run(args: argparse.Namespace) -> int:
    """Draw the visible patches, the reconstruction and the original of pictures side by side, a row for each."""
    import torch

    from .. import masking
    from ..data.seeds import mask_seeds
    from ..train.evaluate import check_takes_pictures
    from ..train.load_run import load_model
    from ..train.reconstruct import draw_grid, find_images, read_images
    from ..train.registry import takes_pairs

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
