"""Small models that accelerate() supports, with their inputs."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cases import Errors, check_draws
from forked_mae import ForkedMAE
from torch import Tensor, nn

import fastmim
from fastmim.interop.accelerate.swap import Fast

transformers = pytest.importorskip("transformers")

SIZES = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=40,
    norm_pix_loss=True,
)  # fmt: skip


@dataclass
class Case:
    """Model with inputs; `run` returns a scalar to minimise, then the other outputs."""

    model: nn.Module
    images: Tensor
    noise: Tensor
    kind: str

    def run(self, model: nn.Module, images: Tensor | None = None) -> tuple[Any, ...]:
        images = self.images.to(next(model.parameters()).dtype) if images is None else images
        torch.manual_seed(7)
        if self.kind == "ViTMAEForPreTraining":
            out = model(images, noise=self.noise)
            return out.loss, out.logits, out.mask, out.ids_restore
        if self.kind == "ViTMAEModel":
            out = model(images)
            return score(out.last_hidden_state), out.last_hidden_state, out.mask, out.ids_restore
        if self.kind == "ViTModel":
            out = model(images)
            return score(out.last_hidden_state), out.last_hidden_state, out.pooler_output
        if self.kind == "lightly":
            keep = torch.cat([torch.zeros(len(images), 1, dtype=torch.long), 1 + self.noise.argsort(1)[:, :5]], 1)
            out = model.encode(images, idx_keep=keep)
            return score(out), out
        if self.kind == "timm":
            out = model(images)
            return score(out), out
        return model(images, 0.7)


def score(out: Tensor) -> Tensor:
    """Reduce to a scalar that a final layer norm does not make constant."""
    return (out.square() * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).mean()


def build(kind: str, request: pytest.FixtureRequest, **changes: Any) -> Case:
    """Build a float32 model with parameters moved away from their initial values."""
    torch.manual_seed(0)
    if kind.startswith("ViT"):
        cls = getattr(transformers, kind)
        names = transformers.ViTConfig().to_dict().keys() if kind == "ViTModel" else {*SIZES, *changes}
        config = "ViTConfig" if kind == "ViTModel" else "ViTMAEConfig"
        settings = {key: value for key, value in {**SIZES, **changes}.items() if key in names}
        model = cls(getattr(transformers, config)(**settings))
    elif kind == "facebook":
        model = ForkedMAE(**changes)
    else:
        timm = request.getfixturevalue("timm")
        sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
        model = timm.models.VisionTransformer(**{**sizes, **changes})
        if kind == "lightly":
            model = request.getfixturevalue("lightly_modules").MaskedVisionTransformerTIMM(model)
        if kind == "facebook, timm":
            layers = timm.models.vision_transformer
            model = ForkedMAE(block=partial(layers.Block, qkv_bias=True), patch_embed=layers.PatchEmbed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return Case(model, torch.randn(3, 3, 32, 32), torch.rand(3, 16), kind)


def redrawn(case: Case, count: int) -> Iterator[Case]:
    """Yield the case, then copies with slightly other weights, other images and other noise."""
    yield case
    for seed in range(1, count):
        torch.manual_seed(seed)
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.randn_like(parameter) / 64)
        yield Case(model, torch.randn_like(case.images), torch.rand_like(case.noise), case.kind)


def check_near(case: Case, measure: Callable[[Case], dict[str, Errors]], count: int = 5) -> None:
    """Run `check_draws` on each error that `measure` returns, over `count` draws of the case."""
    draws = [measure(draw) for draw in redrawn(case, count)]
    for name in draws[0]:
        check_draws([errors[name] for errors in draws], name)


def accelerated(model: nn.Module, **how: Any) -> nn.Module:
    """Return an accelerated copy."""
    model = copy.deepcopy(model)
    fastmim.accelerate(model, **how)
    return model


def gradients(case: Case, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    case.run(model)[0].backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def kinds(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def fast(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Fast)]
