"""Sizes of a masked autoencoder, and the FLOPs that each contestant's algorithm needs."""

from dataclasses import dataclass

from torch import nn

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
    """L patches of P values; encoder and decoder width, depth, heads."""

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

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Read the sizes of a fastmim model."""
        return cls(
            image=model.patch_embed.img_size[0],
            patch=model.patch_embed.patch_size[0],
            patches=model.patch_embed.num_patches,
            values=model.decoder_pred.out_features,
            width=model.cls_token.shape[-1],
            depth=len(model.blocks),
            heads=model.blocks[0].attn.num_heads,
            decoder_width=model.mask_token.shape[-1],
            decoder_depth=len(model.decoder_blocks),
            decoder_heads=model.decoder_blocks[0].attn.num_heads,
        )

    def visible(self, cell: Cell) -> int:
        """Return K."""
        return int(self.patches * (1 - cell.mask_ratio))

    def predicted(self, cell: Cell) -> int:
        """Return M."""
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
