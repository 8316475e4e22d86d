"""The command `fastmim evaluate`."""

import argparse

from .options import add_checkpoint, add_threads, as_count, as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "data", metavar="DATA", type=as_path, help="a folder of class folders, or of train and test folders of them"
    )
    parser.add_argument(
        "--labels-per-class", type=as_count, metavar="N", help="training images of each class. Default: all"
    )
    parser.add_argument("--pool", choices=("mean", "class"), default="mean", help="pooling of tokens. Default: mean")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Classify images by frozen features, with 20 nearest neighbours and with a linear probe.

    The accuracies are printed beside those of a random encoder of the same shape and of raw pixels, and explained.
    """
    import copy

    import torch

    from ..train.evaluate import check_takes_pictures, compare, explain, read_split
    from ..train.load_run import load_model

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
