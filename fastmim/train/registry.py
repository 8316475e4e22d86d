"""Models that a config names: the functions of named sizes and the classes of fastmim.models."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import models
from ..models.masked_autoencoder import MaskedAutoencoder


def _found() -> dict[str, Callable[..., MaskedAutoencoder]]:
    """Return the functions named SYSTEM_vit_SIZE... and the classes of masked autoencoders, by name."""
    functions: dict[str, Callable[..., MaskedAutoencoder]] = {}
    classes: dict[str, Callable[..., MaskedAutoencoder]] = {}
    for entry in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"{models.__name__}.{entry.name}")
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            if inspect.isfunction(value) and "_vit_" in name:
                functions[name] = value
            elif inspect.isclass(value) and issubclass(value, MaskedAutoencoder):
                classes[name] = value
    return functions | classes


MODELS = _found()
# "tiny" for mae_vit_tiny_patch16
SHORT = {name.split("_")[2]: name for name in MODELS if name.startswith("mae_vit_")}


def build(name: str, options: dict[str, Any]) -> MaskedAutoencoder:
    """Build the model called `name`; its weights are drawn from torch's generator.

    Raises:
        TypeError, ValueError: options that the model does not have, or values that it refuses.
    """
    make = MODELS[name]
    arguments = inspect.signature(make.__init__ if inspect.isclass(make) else make).parameters.values()
    missing = [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    if absent := [argument for argument in missing if argument != "self" and argument not in options]:
        raise ValueError(f"model_options must hold {' and '.join(absent)} for model {name}")
    return make(**options)


def takes_pairs(model: nn.Module) -> bool:
    """Return whether the model predicts patches of one view with another one."""
    return getattr(model, "decoder", None) == "both"
