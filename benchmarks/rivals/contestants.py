"""Contestants of a benchmark: one training step each, from the same weights, on the same images and noise."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

import fastmim
from fastmim.train.schedule import decay_groups
from pictures.photographs import normalise
from rivals.plain_mae import PlainGatherMAE, PlainMAE
from rivals.sizes import PARTIAL, Cell, Sizes

MODELS = {
    "tiny": fastmim.mae_vit_tiny_patch16,
    "small": fastmim.mae_vit_small_patch16,
    "base": fastmim.mae_vit_base_patch16,
    "large": fastmim.mae_vit_large_patch16,
    "huge": fastmim.mae_vit_huge_patch14,
}
PATCH_SIZES = {model: 14 if model == "huge" else 16 for model in MODELS}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# the same algorithm first, beside ours
PEERS = ("plain-gather", "plain", "huggingface")
# suffix of a peer that fastmim.accelerate() has changed
ACCELERATED = "+accelerated"


@dataclass(frozen=True)
class Setting:
    """Settings that all contestants of a table share, besides the cell."""

    model: str
    image_size: int
    batch_size: int
    dtype: str
    device: str

    def template(self) -> fastmim.MaskedAutoencoderViT:
        """Return the fastmim model whose weights all contestants start from."""
        torch.manual_seed(0)
        return MODELS[self.model](img_size=self.image_size, norm_pix_loss=True)

    def autocast(self) -> AbstractContextManager[None]:
        """Narrow the products; the residual stream, weights and reductions stay fp32 in every contestant."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")


@dataclass(frozen=True)
class Batch:
    """Images twice, uint8 for fastmim, normalised outside the clock for its peers; noise (B, L)."""

    images: Tensor
    floats: Tensor
    noise: Tensor

    def head(self, count: int) -> "Batch":
        return Batch(self.images[:count], self.floats[:count], self.noise[:count])


def batches(images: Tensor, batch_size: int, patches: int) -> Iterator[Batch]:
    """Yield batches without end, from uint8 images (N, 3, H, W) in turns, with fresh noise each time."""
    pool = [(part, normalise(part, torch.float32)) for part in images.split(batch_size)]
    generator = torch.Generator(images.device).manual_seed(0)
    for part, floats in cycle(pool):
        yield Batch(part, floats, torch.rand(batch_size, patches, generator=generator, device=images.device))


class Contestant:
    """One model and its optimiser.

    Args:
        form: "fastmim" or one of PEERS, of which some may be accelerated: "huggingface+accelerated".
        template: gives sizes and weights.
        compiled: run the loss under torch.compile.
    """

    def __init__(self, form: str, setting: Setting, template: nn.Module, compiled: bool = False) -> None:
        self.form, self.setting, self.compiled = form, setting, compiled
        self.name = form + "+compile" * compiled
        self.sizes = Sizes.of(template)
        self.model = _build(form, setting, template, self.sizes).to(setting.device)
        self.optimizer = adamw(self.model)
        self.attention = ""

    def enter(self, cell: Cell) -> None:
        """Prepare for a cell of the grid: choose the form of attention, compile if asked."""
        if isinstance(self.model, PlainMAE):
            dtype = DTYPES[self.setting.dtype]
            self.attention = self.model.choose_attention(cell, self.setting.batch_size, dtype, self.compiled)
        loss = _loss_function(self.form, self.model, cell)
        self.loss: Callable[[Batch], Tensor] = torch.compile(loss, dynamic=False) if self.compiled else loss

    def step(self, batch: Batch) -> Tensor:
        """Run forward, backward and optimiser; return the loss."""
        with self.setting.autocast():
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def decodes_all(self, cell: Cell) -> bool:
        """Return whether this contestant decodes all patches although the cell asks for fewer."""
        return cell.decode_ratio < 1 and self.form not in PARTIAL


def _build(form: str, setting: Setting, template: nn.Module, sizes: Sizes) -> nn.Module:
    if form.endswith(ACCELERATED):
        model = _build(form.removesuffix(ACCELERATED), setting, template, sizes)
        fastmim.accelerate(model)
        return model
    weights = template.state_dict()
    if form == "huggingface":
        from rivals import vit_mae  # slow to import, and not needed in every process

        with torch.device(setting.device):
            model = vit_mae.build(sizes)
        vit_mae.load(model, weights)
        return model
    build = {"fastmim": lambda _: setting.template(), "plain": PlainMAE, "plain-gather": PlainGatherMAE}[form]
    with torch.device(setting.device):  # where drawing the initial values, which are replaced, is fast
        model = build(sizes)
    model.load_state_dict(weights)
    return model


def _loss_function(form: str, model: nn.Module, cell: Cell) -> Callable[[Batch], Tensor]:
    if form == "fastmim":
        r, q = cell.mask_ratio, cell.decode_ratio
        return lambda batch: model(batch.images, mask_ratio=r, decode_ratio=q, noise=batch.noise).loss
    if form.startswith("huggingface"):
        model.config.mask_ratio = cell.mask_ratio
        return lambda batch: model(batch.floats, noise=batch.noise).loss
    return lambda batch: model(batch.floats, batch.noise, cell)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimiser of all contestants, without decay of vectors."""
    return torch.optim.AdamW(decay_groups(model, 0.05), lr=1.5e-4, betas=(0.9, 0.95), fused=True)
