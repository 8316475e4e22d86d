"""Sizes of a masked autoencoder, and the FLOPs that each contestant's algorithm needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastmim import Mask
from fastmim.models.cost import step_flops

# contestants that embed the visible and decode and score the predicted patches; the others compute all L tokens
PARTIAL = ("fastmim", "plain-gather")


@dataclass(frozen=True)
class Cell:
    """One line of the grid: the share of patches removed, and the share of those that is predicted."""

    mask_ratio: float
    decode_ratio: float

    def __str__(self) -> str:
        return f"mask {self.mask_ratio:g}, decode {self.decode_ratio:g}"


@dataclass(frozen=True)
class Sizes:
    """L patches of P values; encoder and decoder width, depth, heads.

    Args:
        prefix: class tokens.
        learned: positions are trained.
        tubelet: frames of a patch; 0 of images.
        draw: draws masks of a batch size and a cell; None: patches at random, with facebookresearch/mae's counts.
        teacher: of distillation, an encoder.
    """

    image: int
    patch: int
    patches: int
    values: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    prefix: int = 1
    learned: bool = False
    tubelet: int = 0
    draw: Callable[[int, Cell], Mask] | None = None
    teacher: "Sizes | None" = None

    @classmethod
    def of(cls, model: nn.Module, **others: Any) -> "Sizes":
        """Read the sizes of a fastmim model, of an encoder with a decoder of width 0; `others` are further fields."""
        decoder = getattr(model, "decoder_blocks", None)
        return cls(
            image=model.patch_embed.img_size[-1],
            patch=model.patch_embed.patch_size[-1],
            patches=model.patch_embed.num_patches,
            values=3 * math.prod(model.patch_embed.patch_size),
            width=model.embed_dim,
            depth=len(model.blocks),
            heads=model.num_heads,
            decoder_width=0 if decoder is None else model.mask_token.shape[-1],
            decoder_depth=0 if decoder is None else len(decoder),
            decoder_heads=0 if decoder is None else model.decoder_num_heads,
            prefix=model.num_prefix_tokens,
            learned=model.position == "learned",
            tubelet=model.patch_size[0] if len(model.patch_size) == 3 else 0,
            **others,
        )

    @property
    def patch_shape(self) -> tuple[int, ...]:
        return (self.tubelet,) * (self.tubelet > 0) + (self.patch, self.patch)

    def visible(self, cell: Cell) -> int:
        """Return K."""
        if self.draw is not None:
            return self.draw(1, cell).ids_keep.shape[1]
        return int(self.patches * (1 - cell.mask_ratio))

    def predicted(self, cell: Cell) -> int:
        """Return M."""
        if self.draw is not None:
            return self.draw(1, cell).ids_predict.shape[1]
        return max(1, round(cell.decode_ratio * (self.patches - self.visible(cell))))


def train_flops(sizes: Sizes, form: str, cell: Cell) -> int:
    """Return the FLOPs of one image's forward and backward pass, matrix products only, two per multiply-add."""
    visible, tokens = sizes.visible(cell), 1 + sizes.patches
    counts = dict(embedded=sizes.patches, decoded=tokens, queries=tokens, scored=tokens)
    if form in PARTIAL:
        predicted = sizes.predicted(cell)
        counts = dict(embedded=visible, decoded=1 + visible + predicted, queries=predicted, scored=predicted)
    widths = sizes.values, sizes.width, sizes.depth, sizes.decoder_width, sizes.decoder_depth
    return step_flops(*widths, visible=1 + visible, **counts)


def classify_flops(sizes: Sizes) -> int:
    """Return the FLOPs of a whole image's step through the encoder alone; a classifier's last layer is not counted."""
    encoder = sizes.values, sizes.width, sizes.depth, 0, 0
    return step_flops(*encoder, embedded=sizes.patches, visible=1 + sizes.patches, decoded=0, queries=0, scored=0)
