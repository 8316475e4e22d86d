"""Accelerate the models of other libraries in place, undo it, and report what is accelerated."""

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
    "Hugging Face ViTMAEForPreTraining, ViTMAEModel, ViTModel, VideoMAEForPreTraining and VideoMAEModel "
    "(transformers 5.15 to 5.24), timm VisionTransformer, "
    "MaskedAutoencoderViT in the manner of facebookresearch/mae, lightly's masked vision transformers"
)

_NUMBER = re.compile(r"\b\d+\b")


class UnsupportedModelError(ValueError):
    """Error for a model in which nothing can be accelerated as asked; it gives the reason for each module."""


@dataclass(frozen=True)
class Report:
    """Report of `accelerate` on one model, to be printed.

    Attributes:
        model: name of the model's class.
        accelerated: description of each accelerated module, by its path; "" is the model itself.
        kept: reasons for each module that is kept, by its path. Modules without parameters of their own may be absent.
    """

    model: str
    accelerated: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.accelerated)} modules accelerated"]
        lines += _grouped(self.accelerated)
        if self.kept:
            lines += ["kept:", *_grouped(self.kept)]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, predict: Literal["all", "masked"] = "all", strict: bool = True) -> Report:
    """Run a masked autoencoder or vision transformer of another library on fastmim's kernels, in place.

    Only the classes of modules change, on this instance alone. Weights, `state_dict`, hooks, copies, pickles, gradient
    checkpointing, DDP, FSDP, torch.compile and `save_pretrained` work as before. The same inputs, noise and seeds give
    the same results up to rounding.

    These parts are accelerated: masking (no sorts), patch embedding (visible patches only), attention over short
    sequences, norm and GELU, the decoder's input, and the loss (its target is read from the image). Each is replaced
    only where fastmim knows exactly what the method does: a method that a subclass overrides is never replaced, and a
    module with active dropout keeps its own attention. The model's own code runs for calls with attention masks,
    attention weights or images that require grad; for modules that are hooked or replaced (by LoRA, pruning,
    quantisation); and for all modules under global module hooks, `torch.func` and forward-mode AD. Second derivatives
    (`create_graph=True`) can't be taken: `restore` the model first.

    Args:
        model: a model, or a module that contains one. A model that is accelerated already is restored first.
        predict: "all", the default: predict the patches that the model predicts. "masked": a `ViTMAEForPreTraining` or
            MaskedAutoencoderViT predicts the removed patches only. The loss and its gradients stay the same;
            predictions (`logits`) are (B, M, P) in the order of rank of noise, `ids_restore.argsort(1)[:, K:]`.
        strict: raise if nothing can be accelerated; default True.

    Returns:
        A report of what is accelerated, and why the rest is not.

    Raises:
        UnsupportedModelError: a ValueError. With `strict`: nothing can be accelerated, or predict="masked" and no part
            of the model can predict fewer patches.
        TypeError: `model` is not a module.
        ValueError: `predict` is neither "all" nor "masked"; or as `restore`.
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
            f'predict="masked": no part of model can predict fewer patches\n{report}'
        ) from cause
    for path, choice in choices.items():
        if choice.mixins:
            swap(model.get_submodule(path), choice.mixins)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: give each module its own class back. Does nothing to a model that is not accelerated.

    Args:
        model: a model, or a module that contains one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the class of an accelerated module was changed after `accelerate`; nothing is undone.
    """
    _check(model)
    modules = list(model.modules())
    for module in modules:
        unswap(module, dry=True)
    for module in modules:
        unswap(module)


def explain(model: nn.Module) -> Report:
    """Report what `accelerate` would change in `model`, or has changed, and why the rest is kept. Changes nothing.

    Args:
        model: a model, or a module that contains one.

    Returns:
        The report that `accelerate(model)` returns; of an accelerated model, that with its `predict`.

    Raises:
        TypeError: `model` is not a module.
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
    """Decide on each module that is known or has parameters, by its path."""
    choices: dict[str, Choice] = {}
    for path, module in model.named_modules():
        choice = _choose(module, predict)
        parent = choices.get(path.rpartition(".")[0], Choice())
        has_parameters = next(module.parameters(recurse=False), None) is not None
        # an accelerated module runs its parts itself
        if choice is None and not (path and (parent.mixins or parent.inside)) and has_parameters:
            choice = Choice(kept=(f"fastmim has no replacement for {type(module).__name__}",))
        if choice is not None:
            choices[path] = choice
    return choices or {"": Choice(kept=(f"a {type(model).__name__} has no parameters",))}


def _choose(module: nn.Module, predict: str) -> Choice | None:
    """Decide on one module, by the package that its class or a base comes from, else by its structure."""
    packages = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    for package, name in (("transformers", "huggingface"), ("transformers", "videomae"), ("lightly", "lightly")):
        if package in packages:
            try:
                replacements: Any = importlib.import_module(f".{name}", __package__)
            except ImportError as error:
                return Choice(kept=(_not_importable(package, error),), error=error)
            choice: Choice | None = replacements.choose(module, predict)
            if choice is not None:
                return choice
    return timm.choose(module) or facebook.choose(module, predict)


def _not_importable(package: str, error: ImportError) -> str:
    """Reason why the replacements for `package` can't be imported: another version, or a missing dependency."""
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    missing = (error.name or "").partition(".")[0]
    version = getattr(sys.modules[package], "__version__", "of unknown version")
    if missing in (package, "fastmim"):
        supported = "1.6" if package == "lightly" else "5.15 to 5.24"
        return f"{package} {version} differs from the supported {supported}: {error}"
    return f"{package} {version} needs {missing or 'a module'} that can't be imported: {error}"


def _report(model: nn.Module, choices: dict[str, Choice]) -> Report:
    accelerated = {
        path: "; ".join(mixin.description for mixin in choice.mixins)
        for path, choice in choices.items()
        if choice.mixins
    }
    kept = {path: "; ".join(choice.kept) for path, choice in choices.items() if choice.kept}
    return Report(type(model).__name__, accelerated, kept)


def _grouped(texts: dict[str, str]) -> list[str]:
    """Lines of the report: paths that differ in numbers only and have the same text share one."""
    groups = Counter((_NUMBER.sub("*", path), text) for path, text in texts.items())
    return [f"  {path or 'the model'}{f' ({count})' * (count > 1)}: {text}" for (path, text), count in groups.items()]
