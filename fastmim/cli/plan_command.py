"""The command `fastmim plan`."""

import argparse
import math
from typing import Any

from .options import as_count

RATES = "--memory-gb, --copy-tbs and --product-tflops"
# of rates, in any of their units
LEAST, MOST = 1e-6, 1e9


def as_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not LEAST <= rate <= MOST:
        raise argparse.ArgumentTypeError(f"must be a number above 0, from {LEAST:g} to {MOST:g}, got {text!r}")
    return rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of one that comes with fastmim")
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", default=[], help="replaces a key of CONFIG, as in pretrain"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"h100, a100, l40s, 4090, ...; an unknown name lists all. custom: a card of {RATES}. Default: h100",
    )
    parser.add_argument(
        "--gpus", type=as_count, metavar="N", help="GPUs of each node; without --nodes, GPUs in all. Default: 1"
    )
    parser.add_argument("--nodes", type=as_count, metavar="M", help="default: as few as have 8 GPUs or less each")
    parser.add_argument(
        "--here",
        action="store_true",
        help="plan for the CPUs of this machine; measures them for ten seconds, and the disk",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--images", type=as_count, metavar="N", help="samples of the data, where they are not at hand")
    parser.add_argument("--loader-rate", type=as_rate, metavar="N", help="images/s that the loaders of a host give")
    parser.add_argument("--disk-gbs", type=as_rate, metavar="N", help="GB/s at which checkpoints are written")
    parser.add_argument("--network-gbps", type=as_rate, metavar="N", help="Gbit/s that a node sends to others")
    card = parser.add_argument_group("--gpu custom")
    card.add_argument("--memory-gb", type=as_rate, metavar="N", help="GB of memory")
    card.add_argument("--copy-tbs", type=as_rate, metavar="N", help="TB/s of a large copy, read and written together")
    card.add_argument("--product-tflops", type=as_rate, metavar="N", help="TFLOP/s of a dense bfloat16 product")
    card.add_argument("--link-gbs", type=as_rate, metavar="N", help="GB/s to other GPUs of the node. Default: 32")


def run(args: argparse.Namespace) -> int:
    """Say what a run needs before it starts: memory, time, traffic, loading, checkpoints, and what is not known.

    Nothing is trained: kernels, bytes and collectives of a step are counted, and take the time that a card's rates
    allow. Data and GPUs need not be there.
    """
    import json
    from dataclasses import replace
    from pathlib import Path

    from ..train.config import read_settings
    from ..train.plan.estimate import Machines
    from ..train.plan.here import calibrate
    from ..train.plan.measured import memory_here
    from ..train.plan.planned import planned, share
    from ..train.plan.planner import Given, images_of, make_plan
    from ..train.plan.report import report
    from ..train.plan.storage import disk_rate

    settings = read_settings(args.config, args.settings)
    config = planned(settings, on_gpu=not args.here)
    # before nodes are sought for any number of GPUs
    share(config, (args.gpus or 1) * (args.nodes or 1))
    gpus, nodes = _nodes(args)
    rates = None
    if args.here:
        if args.gpu or gpus * nodes > 1:
            raise ValueError("--here plans for this machine as it is, without --gpu, --gpus and --nodes")
        rates = calibrate(config)
        card = replace(rates.card, memory=memory_here())
    else:
        card = _card(args)
    if args.network_gbps:
        card = replace(card, network=args.network_gbps * 1e9 / 8)
    written = args.disk_gbs and args.disk_gbs * 1e9
    if args.here and written is None:
        written = disk_rate(Path(config.output_dir))
    images = args.images or (None if config.max_steps else images_of(config))
    machines = Machines(card, gpus, nodes, args.loader_rate, rates)
    plan = make_plan(config, machines, Given(images, written))
    print(json.dumps(plan, indent=1) if args.json else report(plan))
    return 0


def _nodes(args: argparse.Namespace) -> tuple[int, int]:
    """Return GPUs of a node, and nodes."""
    gpus = args.gpus or 1
    if args.nodes is not None:
        return gpus, args.nodes
    nodes = next(nodes for nodes in range(1, gpus + 1) if gpus % nodes == 0 and gpus // nodes <= 8)
    return gpus // nodes, nodes


def _card(args: argparse.Namespace) -> Any:
    from ..train.flops.cards import CARDS, custom
    from ..train.plan.measured import measured_card

    name = (args.gpu or "h100").lower()
    rates = args.memory_gb, args.copy_tbs, args.product_tflops
    if name == "custom":
        if None in rates:
            raise ValueError(f"--gpu custom needs {RATES}")
        return custom(*rates, link_gbs=args.link_gbs)
    if name not in CARDS:
        raise ValueError(
            f"--gpu must be one of {', '.join(CARDS)}, or custom with {RATES}, and --link-gbs and --network-gbps; "
            f"got {args.gpu!r}"
        )
    if any(rate is not None for rate in (*rates, args.link_gbs)):
        raise ValueError(f"{RATES}, and --link-gbs, are for --gpu custom; got --gpu {name}")
    return measured_card(name)
