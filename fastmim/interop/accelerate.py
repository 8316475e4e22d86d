"""`accelerate`, `restore`, `explain`: other people's models made fast in place."""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .accelerated.swap import Fast, swap, unswap

SUPPORTED = (
    "Hugging Face ViTMAEForPreTraining, ViTMAEModel and ViTModel (transformers 5), timm VisionTransformer, "
    "MaskedAutoencoderViT in the manner of facebookresearch/mae, lightly's masked vision transformers"
)

_NUMBER = re.compile(r"\b\d+\b")


class UnsupportedModelError(ValueError):
    """Nothing in a model could be accelerated."""


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
    the model's own code.

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
    plan, kept = _plan(model, predict)
    report = Report(type(model).__name__, {path: mixin.what for path, mixin in plan.items()}, kept)
    if strict and not plan:
        raise UnsupportedModelError(f"nothing in model can be accelerated; supported: {SUPPORTED}\n{report}")
    if strict and predict == "masked" and not any(mixin.only_masked for mixin in plan.values()):
        raise UnsupportedModelError(f'predict="masked": nothing in model can be made to predict less\n{report}')
    for path, mixin in plan.items():
        swap(model.get_submodule(path), mixin)
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

    Of an accelerated model: what is accelerated.

    Raises:
        TypeError: not a module.
    """
    _check(model)
    plan, kept = _plan(model, "all")
    return Report(type(model).__name__, {path: mixin.what for path, mixin in plan.items()}, kept)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _plan(model: nn.Module, predict: str) -> tuple[dict[str, type[Fast]], dict[str, str]]:
    """What each module is to be accelerated as, and why the others stay."""
    plan: dict[str, type[Fast]] = {}
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        choice = module._fastmim_mixin if isinstance(module, Fast) else _choose(module, predict)
        if isinstance(choice, str):
            kept[path] = choice
        elif choice is not None:
            plan[path] = choice
        elif next(module.parameters(recurse=False), None) is not None and path.rpartition(".")[0] not in plan:
            kept[path] = f"a {type(module).__name__} has no kernel of its own here"
    if not plan and not kept:
        kept[""] = f"{type(model).__name__} has no parameters"
    return plan, kept


def _choose(module: nn.Module, predict: str) -> type[Fast] | str | None:
    """By the packages that its class and its bases come from; those are imported already."""
    packages = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    choice: type[Fast] | str | None = None
    if "transformers" in packages:
        try:
            from .accelerated import huggingface
        except ImportError as error:
            return f"transformers {sys.modules['transformers'].__version__} writes it otherwise than 5 ({error})"
        choice = huggingface.choose(module, predict)
    return choice


def _grouped(says: dict[str, str]) -> list[str]:
    """A line for all paths that differ in numbers alone and of which the same is said."""
    groups = Counter((_NUMBER.sub("*", path), said) for path, said in says.items())
    return [f"  {path or 'the model'}{f' ({count})' * (count > 1)}: {said}" for (path, said), count in groups.items()]
