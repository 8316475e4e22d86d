"""Sentences on figures that a plan does not know."""

from typing import Any

from ..config import Config
from ..graphs import replays
from .estimate import HOST_LAUNCH, Machines, Step
from .traffic import REACHED


def unknown(config: Config, machines: Machines, step: Step, plan: dict[str, Any]) -> list[str]:
    """Return sentences on the figures that a plan does not know.

    Args:
        config, machines, step: of the run.
        plan: what is known.
    """
    card = machines.card
    found = list(step.assumed)
    if machines.rates is not None:
        found.append(
            "The step is reckoned from rates of this machine that were measured a moment ago, beside whatever else "
            "ran. A run also waits for its loader and for other programs."
        )
    elif step.efficiency is not None:
        found.append(f"The step is predicted from another that was measured: {step.source}.")
    else:
        rates = f"{card.copy / 1e12:.2g} TB/s and {card.product / 1e12:.3g} TFLOP/s"
        found.append(
            f"No step was timed on this card, {card.name}: the step time is a floor, each kernel at {rates} "
            f"({card.source}), and real steps take longer."
        )
    if machines.rates is None:
        found.append("Memory is counted, not measured; 1.5 GB are left for CUDA and fragments, which is assumed.")
    if machines.rates is None and config.dtype != "bfloat16":
        found.append(
            f"Products of {config.dtype} are taken at the card's rate of bfloat16; they are several times slower."
        )
    if config.compile:
        found.append("Kernels are counted as eager PyTorch runs them; compile=true fuses some, and needs less time.")
    if machines.rates is None and step.efficiency is None and not replays(config, machines.world):
        found.append(
            f"Eager PyTorch is taken to launch a kernel in {1e6 * HOST_LAUNCH:.0f} µs; the host was not measured."
        )
    if machines.world > 1:
        links = []
        if machines.gpus > 1:
            links.append(f"{card.linked} at {(card.link or 0) / 1e9:.0f} GB/s a GPU")
        if machines.nodes > 1:
            links.append(
                f"the network at {(card.network or 0) * 8 / 1e9:.0f} Gbit/s a node (--network-gbps changes it)"
            )
        found.append(
            f"Communication is not measured: {' and '.join(links)}, of which {REACHED:.0%} are taken to be reached, "
            "hidden behind the pass that it belongs to."
        )
    if plan["steps"] is None:
        found.append(
            f"The size of data {config.data} is not known, so neither are steps, days and GPU-hours: give --images N "
            "or max_steps=N."
        )
    loader = plan["loader"]
    if loader["images_per_second_given"] is None:
        on = f"{loader['measured']['device_name']}, {loader['measured']['cpus']} CPUs" if loader["measured"] else None
        seen = f"; the rates shown are of {on}" if on else ""
        found.append(f"The loader's rate on your machines is not known{seen}: give --loader-rate N.")
    if loader["measured"]:
        measured = loader["measured"]["image_size"]
        size = [config.image_size] * len(measured) if isinstance(config.image_size, int) else list(config.image_size)
        if size != measured:
            of, own = (" x ".join(map(str, sizes)) for sizes in (measured, size))
            found.append(f"The loader was measured with crops of {of}, not of {own}, for which it needs other CPUs.")
    if plan["checkpoint"]["seconds"] is None:
        found.append("The disk's rate is not known, so neither is the time to write a checkpoint: give --disk-gbs N.")
    return found
