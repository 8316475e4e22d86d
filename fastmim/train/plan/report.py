"""A plan as text."""

import textwrap
from collections.abc import Iterator
from typing import Any

WIDTH, LABEL = 110, 20
PASSES = "forward", "backward", "update"
# of memory, beside activations
KINDS = "weights", "gradients", "optimizer", "average", "copies", "batch", "workspace"


def report(plan: dict[str, Any]) -> str:
    """Format what `make_plan` returned as a page of text; every figure is one of the plan's."""
    return "\n".join(_lines(plan))


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    gpus, nodes = plan["gpus"], plan["nodes"]
    here = plan["here"]
    machines = f"{gpus * nodes} x {plan['card']['name']}" + (f" in {nodes} nodes" if nodes > 1 else "")
    machines = f"this machine, {plan['card']['name']}" if here else machines
    yield f"{plan['model']}, batch {plan['batch_size']}, {plan['dtype']}, on {machines}"
    yield ""
    most = " at most" if _least(plan) else ""
    yield _entry("images/s", f"{_rate(plan['images_per_second'])}{most}")
    yield _entry("step", f"{plan['step_milliseconds']:,.1f} ms{_least(plan)}, bound by {plan['bound_by']}")
    yield _entry("run", _run(plan))
    yield _entry("micro-batch", _micro_batch(plan))
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _step(plan)
    yield ""
    yield _entry("communication", _communication(plan))
    yield _entry("loader", _loader(plan["loader"]))
    yield _entry("checkpoint", _checkpoint(plan["checkpoint"], _least(plan)))
    if plan["doubled"]:
        yield _entry("twice the GPUs", _doubled(plan["doubled"]))
    yield ""
    yield "not known"
    for sentence in plan["unknown"]:
        yield textwrap.fill(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _entry(label: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{label:{LABEL}}", subsequent_indent=" " * LABEL)


def _least(plan: dict[str, Any]) -> str:
    """Return what follows a time: whether it is a floor, or reckoned from steps or rates that were measured."""
    return " at least" if plan["efficiency"] is None and not plan["here"] else ""


def size_of(number: float) -> str:
    """Format bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}" if number < 100 * unit else f"{number / unit:,.0f} {name}"
    return f"{number / 1e3:.1f} kB"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def _run(plan: dict[str, Any]) -> str:
    if plan["days"] is None:
        return "length not known"
    took = _duration(86400 * plan["days"])
    hours = "" if plan["here"] else f", {plan['gpu_hours']:,.1f} GPU-hours"
    return f"{plan['steps']:,} steps: {took} ({plan['days']:.2f} days){hours}{_least(plan)}"


def _micro_batch(plan: dict[str, Any]) -> str:
    micro, times = plan["micro_batch_size"], plan["micro_batches"]
    taker = "the machine" if plan["here"] else "a GPU"
    text = f"{micro} of the {plan['batch_size_per_gpu']} that {taker} takes, {times} a step"
    if times > 1 and plan["micro_batch_size_set"] is None:
        text += f"; all at once don't fit: set micro_batch_size={micro}"
    return text


def _memory(plan: dict[str, Any]) -> Iterator[str]:
    memory, free = plan["memory"], plan["memory_bytes_free"]
    whole, owner = ("the machine", "memory of tensors") if plan["here"] else ("the card", "memory of a GPU")
    of = "" if free is None else f", {size_of(free)} of {whole} left"
    yield _entry(owner, f"{size_of(plan['memory_bytes_per_gpu'])}{of}")
    kinds = {kind: memory[kind] for kind in KINDS if memory[kind]}
    yield _entry("", ", ".join(f"{kind} {size_of(value)}" for kind, value in kinds.items()))
    stages = {stage: value for stage, value in memory["activations"].items() if value}
    yield _entry("", "activations: " + ", ".join(f"{stage} {size_of(value)}" for stage, value in stages.items()))
    if plan["fits"]:
        yield _entry("largest micro-batch", "; ".join(_fit(fit) for fit in plan["fits"]))


def _fit(fit: dict[str, Any]) -> str:
    how = ("sharded" if fit["sharded"] else "replicated") + (", recomputed" if fit["checkpoint_activations"] else "")
    return f"{how}: {fit['micro_batch'] or 'none'}"


def _step(plan: dict[str, Any]) -> Iterator[str]:
    heads = "".join(f"{name:>11}" for name in PASSES)
    yield f"{'ms' + _least(plan):{LABEL}}{heads}   bound by"
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for part in plan["stages"]:
        rows.setdefault(part["stage"], {})[part["direction"]] = part
    for stage, parts in rows.items():
        cells = [f"{parts[name]['milliseconds']:,.2f}" if name in parts else "" for name in PASSES]
        bounds = dict.fromkeys(part["bound_by"] for part in parts.values())
        alone = parts.get("")
        if alone is not None:
            cells[-1] = f"{alone['milliseconds']:,.2f}"
        yield f"{stage:{LABEL}}" + "".join(f"{cell:>11}" for cell in cells) + "   " + ", ".join(bounds)
    spent = ", ".join(
        f"{bound} {spent:,.1f}" for bound, spent in plan["milliseconds_by_bound"].items() if spent >= 0.05
    )
    yield _entry("by bound", spent)


def _communication(plan: dict[str, Any]) -> str:
    traffic = plan["traffic"]
    if not traffic["collectives"]:
        return f"none: one {'process' if plan['here'] else 'GPU'}"
    how = "FSDP2" if plan["sharded"] else "DDP"
    return (
        f"{size_of(traffic['bytes_sent_per_gpu'])} sent by each GPU in a step ({how}), "
        f"{traffic['milliseconds']:.1f} ms, of which {traffic['milliseconds_exposed']:.1f} ms are not hidden"
    )


def _loader(loader: dict[str, Any]) -> str:
    text = f"{_rate(loader['images_per_second_per_host'])} images/s a host needed"
    if loader["images_per_second_given"] is not None:
        text += f", {loader['images_per_second_given']:,.0f} given"
    if loader["measured"]:
        found = loader["measured"]
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["images_per_second"].items())
        cpus = ", ".join(f"{name} {count}" for name, count in loader["cpus_needed"].items())
        size = " x ".join(map(str, found["image_size"]))
        text += f"; {found['cpus']} CPUs of {found['device_name']} gave {rates} of {size}: CPUs needed: {cpus}"
    return text


def _checkpoint(saved: dict[str, Any], least: str) -> str:
    text = f"{size_of(saved['bytes'])} each {_duration(saved['seconds_between'])}{least}"
    if saved["seconds"] is not None:
        text += f", written in {_duration(saved['seconds'])} beside the training"
    return f"{text}; {size_of(saved['kept_bytes'])} kept, final model {size_of(saved['final_bytes'])}"


def _doubled(doubled: dict[str, Any]) -> str:
    where = f"{doubled['gpus'] * doubled['nodes']} GPUs"
    if doubled["speed_up"] is None:
        return f"{where}: {doubled['bottleneck']}"
    return (
        f"{where}: {doubled['speed_up']:.2f} times as fast, {_rate(doubled['images_per_second'])} images/s; "
        f"first bottleneck: {doubled['bottleneck']}"
    )
