"""`accelerate`, `restore`, `explain`: other people's models made fast in place."""

import importlib
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from . import facebook, timm
from .swap import Choice, Fast, swap, unswap

SUPPORTED = (
    "Hugging Face ViTMAEForPreTraining, ViTMAEModel and ViTModel (transformers 5.15 to 5.24), timm VisionTransformer, "
    "MaskedAutoencoderViT in the manner of facebookresearch/mae, lightly's masked vision transformers"
)

_NUMBER = re.compile(r"\b\d+\b")


class UnsupportedModelError(ValueError):
    """Nothing in a model can be accelerated, or not as was asked; the message says why of each module."""


@dataclass(frozen=True)
class Report:
    """What is accelerated in a model and why the rest is not; print it.

    Attributes:
        model: the model's class.
        accelerated: what each accelerated module does now, by its path; "" is the model itself.
        kept: why each other module that has parameters of its own, or that was looked at, stays as it is.
    """

    model: str
    accelerated: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.accelerated)} modules accelerated"]
        lines += _grouped(self.accelerated)
        if self.kept:
            lines += ["as they are:", *_grouped(self.kept)]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, predict: Literal["all", "masked"] = "all", strict: bool = True) -> Report:
    """Make somebody's masked autoencoder or vision transformer fast, in place.

    The classes of modules change on this instance, and nothing else: weights, `state_dict`, hooks, copies, pickles,
    gradient checkpointing, DDP, FSDP, torch.compile and `save_pretrained` go on as before, and other models in the
    process are not touched. The same inputs, noise and seeds give the same results but for rounding.

    Accelerated are masking (no sorts), patch embedding (visible patches only), attention over short sequences, norm and
    GELU, the decoder's input, and the loss (its target is read from the image), each where the methods that do it are
    exactly known: a method that a fork overrides is never replaced, and a module whose dropout is active keeps its own
    attention. What a call asks for besides (attention masks, attention weights, images that require grad) is left to
    the model's own code, and so is each module that is hooked or replaced (by LoRA, pruning, quantisation), and all of
    them under global module hooks, `torch.func` and forward-mode AD. Of a gradient no other can be taken
    (`create_graph=True`): `restore` the model first.

    Args:
        model: a model, or anything that holds one. Calling again starts over.
        predict: "all": as the model does. "masked": a `ViTMAEForPreTraining` or MaskedAutoencoderViT predicts the
            removed patches only, which alone are scored: the loss and its gradients stay, and predictions (`logits`)
            are (B, M, P) in the order of rank of noise, `ids_restore.argsort(1)[:, K:]`.
        strict: whether a model in which nothing can be accelerated is an error.

    Returns:
        What is accelerated and why the rest is not.

    Raises:
        UnsupportedModelError (a ValueError): nothing could be accelerated, and `strict`; or predict="masked" and
            nothing that could predict less.
        TypeError, ValueError: not a module; an unknown `predict`.
    """
    _check(model)
    if predict not in ("all", "masked"):
        raise ValueError(f'predict must be "all" or "masked", got {predict!r}')
    restore(model)
    choices = _choices(model, predict)
    report = _report(model, choices)
    mixins = [mixin for choice in choices.values() for mixin in choice.mixins]
    cause = next((choice.error for choice in choices.values() if choice.error is not None), None)
    if strict and not mixins:
        raise UnsupportedModelError(f"nothing in model can be accelerated; supported: {SUPPORTED}\n{report}") from cause
    if strict and predict == "masked" and not any(mixin.only_masked for mixin in mixins):
        raise UnsupportedModelError(
            f'predict="masked": nothing in model can be made to predict less\n{report}'
        ) from cause
    for path, choice in choices.items():
        if choice.mixins:
            swap(model.get_submodule(path), choice.mixins)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: each module has its own class again. A model that is not accelerated stays as it is.

    Raises:
        TypeError: not a module.
        ValueError: something else has changed the class of an accelerated module since; nothing is undone.
    """
    _check(model)
    modules = list(model.modules())
    for module in modules:
        unswap(module, dry=True)
    for module in modules:
        unswap(module)


def explain(model: nn.Module) -> Report:
    """What `accelerate` would change in `model` and why the rest would stay; changes nothing.

    Of an accelerated model: what is accelerated, and why the rest is not.

    Raises:
        TypeError: not a module.
        ValueError: as `restore`.
    """
    _check(model)
    classes = {module: type(module) for module in model.modules() if isinstance(module, Fast)}
    fewer = any(module.only_masked for module in classes)
    restore(model)
    try:
        return _report(model, _choices(model, "masked" if fewer else "all"))
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _choices(model: nn.Module, predict: str) -> dict[str, Choice]:
    """What to do with each module that there is something to say of."""
    choices: dict[str, Choice] = {}
    for path, module in model.named_modules():
        choice = _choose(module, predict)
        holder = choices.get(path.rpartition(".")[0], Choice())
        # what an accelerated module holds, it runs itself
        if choice is None and not (path and holder.mixins) and next(module.parameters(recurse=False), None) is not None:
            choice = Choice(kept=(f"a {type(module).__name__} has no kernel of its own here",))
        if choice is not None:
            choices[path] = choice
    return choices or {"": Choice(kept=(f"a {type(model).__name__} without parameters",))}


def _choose(module: nn.Module, predict: str) -> Choice | None:
    """By the packages that its class and its bases come from, imported already; else by its structure."""
    packages = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    for package, family in (("transformers", "huggingface"), ("lightly", "lightly")):
        if package in packages:
            try:
                known: Any = importlib.import_module(f".{family}", __package__)
            except ImportError as error:
                return Choice(kept=(_not_importable(package, error),), error=error)
            choice: Choice | None = known.choose(module, predict)
            if choice is not None:
                return choice
    return timm.choose(module) or facebook.choose(module, predict)


def _not_importable(package: str, error: ImportError) -> str:
    """Why what is known of a `package` can't be imported: it is of another version, or something else is missing."""
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    missing = (error.name or "").partition(".")[0]
    version = getattr(sys.modules[package], "__version__", "of this version")
    if missing in (package, "fastmim"):
        known = "1.6, which is" if package == "lightly" else "5.15 to 5.24, which are"
        return f"{package} {version} writes it otherwise than {known} known: {error}"
    return f"{package} {version} needs {missing or 'something'} that can't be imported: {error}"


def _report(model: nn.Module, choices: dict[str, Choice]) -> Report:
    accelerated = {path: "; ".join(mixin.what for mixin in choice.mixins) for path, choice in choices.items()}
    kept = {path: "; ".join(choice.kept) for path, choice in choices.items()}
    return Report(
        type(model).__name__,
        {path: what for path, what in accelerated.items() if what},
        {path: why for path, why in kept.items() if why},
    )


def _grouped(says: dict[str, str]) -> list[str]:
    """A line for all paths that differ in numbers alone and of which the same is said."""
    groups = Counter((_NUMBER.sub("*", path), said) for path, said in says.items())
    return [f"  {path or 'the model'}{f' ({count})' * (count > 1)}: {said}" for (path, said), count in groups.items()]
