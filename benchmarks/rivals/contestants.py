"""Contestants of a benchmark: one training step each, from the same weights, on the same images and noise."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor, nn

import fastmim
from fastmim import Mask
from fastmim.train.schedule import decay_groups
from pictures.photographs import normalise
from rivals.plain_mae import Ids, Plain
from rivals.sizes import PARTIAL, Cell, Sizes
from rivals.systems import SYSTEMS, System

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

    @property
    def system(self) -> System:
        return SYSTEMS[self.model]

    def template(self) -> nn.Module:
        """Return the fastmim model whose weights all contestants start from."""
        torch.manual_seed(0)
        return self.system.template(self.image_size)

    def autocast(self) -> AbstractContextManager[None]:
        """Narrow the products; the residual stream, weights and reductions stay fp32 in every contestant."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")


@dataclass(frozen=True)
class Batch:
    """Images twice, uint8 for fastmim, normalised outside the clock for its peers; noise (B, L) or masks."""

    images: Tensor
    floats: Tensor
    noise: Tensor
    mask: Mask | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        mask = self.mask
        ids = [] if mask is None else [mask.ids_keep, mask.ids_predict, mask.ids_restore]
        return [self.images, self.floats, self.noise, *ids]

    def head(self, count: int) -> "Batch":
        images, floats, noise, *ids = (tensor[:count] for tensor in self.tensors())
        return Batch(images, floats, noise, Mask(*ids, self.mask.num_patches) if self.mask else None)

    def predict_all(self) -> "Batch":
        """Return the batch with masks that predict all removed patches."""
        if self.mask is None:
            return self
        keep, restore = self.mask.ids_keep, self.mask.ids_restore
        return replace(self, mask=Mask(keep, restore.argsort(1)[:, keep.shape[1] :], restore, restore.shape[1]))


def batches(images: Tensor, batch_size: int, sizes: Sizes, cell: Cell) -> Iterator[Batch]:
    """Yield batches without end, from uint8 images (N, 3, *size) in turns, with fresh noise and masks each time."""
    pool = [(part, normalise(part, torch.float32)) for part in images.split(batch_size)]
    device = images.device
    generator = torch.Generator(device).manual_seed(0)
    for part, floats in cycle(pool):
        noise = torch.rand(batch_size, sizes.patches, generator=generator, device=device)
        mask = None if sizes.draw is None else sizes.draw(batch_size, cell, generator=generator, device=device)
        yield Batch(part, floats, noise, mask)


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
        self.sizes = setting.system.sizes(template)
        self.model = _build(form, setting, template, self.sizes).to(setting.device)
        self.optimizer = adamw(self.model)
        self.attention = ""

    def enter(self, cell: Cell) -> None:
        """Prepare for a cell of the grid: choose the form of attention, compile if asked."""
        if isinstance(self.model, Plain):
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
    if form == "huggingface" and sizes.tubelet:
        return fastmim.to_huggingface(template)
    if form == "huggingface":
        from rivals import vit_mae  # slow to import, and not needed in every process

        with torch.device(setting.device):
            model = vit_mae.build(sizes)
        vit_mae.load(model, weights)
        return model
    if form == "fastmim":
        model = setting.template()
    else:
        with torch.device(setting.device):  # where drawing the initial values, which are replaced, is fast
            model = setting.system.plain[form](sizes)
    model.load_state_dict(weights)
    return model


def _loss_function(form: str, model: nn.Module, cell: Cell) -> Callable[[Batch], Tensor]:
    """Return the loss of a batch, with the batch's masks if it has any."""

    def ours(batch: Batch) -> Tensor:
        if batch.mask is not None:
            return model(batch.images, mask=batch.mask).loss
        r, q = cell.mask_ratio, cell.decode_ratio
        return model(batch.images, mask_ratio=r, decode_ratio=q, noise=batch.noise).loss

    def hugging_face(batch: Batch) -> Tensor:
        if batch.mask is not None:
            return model(batch.floats.transpose(1, 2), bool_masked_pos=batch.mask.mask).loss
        return model(batch.floats, noise=batch.noise).loss

    def plain(batch: Batch) -> Tensor:
        mask = batch.mask
        if mask is not None:
            return model.score(batch.floats, Ids(mask.ids_keep, mask.ids_predict, mask.ids_restore))
        return model(batch.floats, batch.noise, cell)

    if form == "fastmim":
        return ours
    if not form.startswith("huggingface"):
        return plain
    model.config.mask_ratio = cell.mask_ratio
    return hugging_face


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimiser of all contestants, without decay of vectors."""
    return torch.optim.AdamW(decay_groups(model, 0.05), lr=1.5e-4, betas=(0.9, 0.95), fused=True)
