"""Sizes of a masked autoencoder, and the FLOPs that each contestant's algorithm needs."""

from dataclasses import dataclass

from torch import nn

# embed what is visible, decode and score what is predicted; the others work on all L tokens
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
    """FLOPs of one image's forward and backward pass, matrix products only, two per multiply-add."""
    visible = sizes.visible(cell)
    if form in PARTIAL:
        embedded, scored = visible, sizes.predicted(cell)
        tokens, last_queries = 1 + visible + scored, scored
    else:
        embedded, scored = sizes.patches, 1 + sizes.patches
        tokens = last_queries = 1 + sizes.patches
    forward = sizes.depth * _block(sizes.width, 1 + visible, 1 + visible)
    forward += 2 * (1 + visible) * sizes.width * sizes.decoder_width
    forward += (sizes.decoder_depth - 1) * _block(sizes.decoder_width, tokens, tokens)
    forward += _block(sizes.decoder_width, last_queries, tokens)
    forward += 2 * scored * sizes.decoder_width * sizes.values
    # images need no gradient, so embedding has one product in its backward pass, the others two
    return 3 * forward + 2 * (2 * embedded * sizes.values * sizes.width)


def classify_flops(sizes: Sizes) -> int:
    """FLOPs of one whole image's step through the encoder alone; a classifier's last layer is not worth counting."""
    tokens = 1 + sizes.patches
    return 3 * sizes.depth * _block(sizes.width, tokens, tokens) + 2 * (2 * sizes.patches * sizes.values * sizes.width)


def _block(width: int, queries: int, tokens: int) -> int:
    keys_values = 2 * tokens * 2 * width**2
    attention = 2 * 2 * queries * tokens * width
    queries_projection_mlp = 2 * queries * 10 * width**2
    return keys_values + attention + queries_projection_mlp
