"""A masked autoencoder in plain PyTorch, in the two forms that fastmim is measured against.

Written from the formulas of He et al., "Masked autoencoders are scalable vision learners" (CVPR 2022);
parameters are named as in facebookresearch/mae. Letters: B batch, L patches, K visible, M predicted,
N prefix tokens, D width, S sequence length, P values of a patch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.attention_forms import fastest, sdpa
from rivals.sizes import Cell, Sizes


class Ids(NamedTuple):
    """Visible patches (B, K), those to predict (B, M), and the rank of each patch (B, L) for who needs it."""

    keep: Tensor
    predict: Tensor
    restore: Tensor | None


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attend = sdpa

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attend from the tokens x (B, S, D), or the last `queries` of them, to all of x: (B, S or queries, D)."""
        if queries is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        else:
            sizes = [x.shape[-1], 2 * x.shape[-1]]
            (q_weight, kv_weight), (q_bias, kv_bias) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
            q = F.linear(x[:, -queries:], q_weight, q_bias)
            q = q.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            kv = F.linear(x, kv_weight, kv_bias)
            k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Apply the block to x (B, S, D): (B, S, D), or the last tokens only, (B, queries, D)."""
        attended = self.attn(self.norm1(x), queries)
        x = (x if queries is None else x[:, -queries:]) + attended
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """Base of plain models, whose blocks take the faster form of attention."""

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        raise TypeError(f"{type(self).__name__} must define sequences(cell)")

    def choose_attention(self, cell: Cell, batch: int, dtype: torch.dtype, compiled: bool) -> str:
        """Give every block the faster form for its shape; return the choice in words."""
        device = next(self.parameters()).device.type
        chosen = {}
        for name, (blocks, heads, queries, keys) in self.sequences(cell).items():
            attentions = [module for module in blocks.modules() if isinstance(module, Attention)]
            attend = fastest(batch, heads, queries, keys, attentions[0].head_dim, dtype, device, compiled)
            chosen[name] = attend.__name__
            for attention in attentions:
                attention.attend = attend
        return ", ".join(f"{name} {form}" for name, form in chosen.items())


class PlainEncoder(Plain):
    """Embedding of patches, positions, prefix tokens and blocks."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = nn.Module()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(sizes.patch_shape)]
        self.patch_embed.proj = conv(3, sizes.width, sizes.patch_shape, sizes.patch_shape)
        self.cls_token = nn.Parameter(torch.zeros(1, sizes.prefix, sizes.width)) if sizes.prefix else None
        self.pos_embed = self.table(sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)

    def table(self, width: int) -> nn.Parameter:
        """Return positions (1, N+L, width)."""
        rows = self.sizes.prefix + self.sizes.patches
        return nn.Parameter(torch.zeros(1, rows, width), requires_grad=self.sizes.learned)

    def embed(self, patches: "Patches", ids: Tensor) -> Tensor:
        """Embed the patches ids (B, K), with their positions: (B, K, D)."""
        proj = self.patch_embed.proj
        values = patches.pick(ids).flatten(2)
        return F.linear(values, proj.weight.flatten(1), proj.bias) + self.pos_embed[0, self.sizes.prefix :][ids]

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """Yield prefix tokens and patches x (B, K, D) before the first block and after each: (B, N+K, D)."""
        if self.cls_token is not None:
            prefix = (self.cls_token + self.pos_embed[:, : self.sizes.prefix]).expand(len(x), -1, -1)
            x = torch.cat([prefix, x], 1)
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        visible = self.sizes.prefix + self.sizes.visible(cell)
        return {"encoder": (self.blocks, self.sizes.heads, visible, visible)}


class PlainMAE(PlainEncoder):
    """Embed every patch, decode and score every token, as facebookresearch/mae does."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        decoder_width = sizes.decoder_width
        self.decoder_embed = nn.Linear(sizes.width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed = self.table(decoder_width)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, sizes.decoder_heads) for _ in range(sizes.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, sizes.values)

    def forward(self, images: Tensor, noise: Tensor, cell: Cell) -> Tensor:
        """Return the loss of normalised images (B, 3, H, W) with noise (B, L)."""
        kept, ids_shuffle = self.sizes.visible(cell), noise.argsort(1)
        return self.score(images, Ids(ids_shuffle[:, :kept], ids_shuffle[:, kept:], ids_shuffle.argsort(1)))

    def score(self, images: Tensor, ids: Ids) -> Tensor:
        """Return the loss of normalised images; of all removed patches, whichever are to be predicted."""
        (batch, kept), prefix = ids.keep.shape, self.sizes.prefix
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, prefix:]
        x = x.gather(1, ids.keep[:, :, None].expand(-1, -1, x.shape[2]))
        mask = (ids.restore >= kept).float()

        x = self.encode(x)

        removed = self.mask_token.expand(batch, self.sizes.patches - kept, -1)
        tokens = torch.cat([x[:, prefix:], removed], 1)
        tokens = tokens.gather(1, ids.restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        x = torch.cat([x[:, :prefix], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, prefix:]

        error = squared_error(pred, patch_grid(images, self.sizes.patch).permute(0, 1, 2, 4, 5, 3).reshape(pred.shape))
        return (error * mask).sum() / mask.sum()

    def encode(self, x: Tensor) -> Tensor:
        """Encode visible tokens (B, K, D) to (B, N+K, decoder width), prefix tokens first."""
        for state in self.states(x):
            x = state
        return self.decoder_embed(self.norm(x))

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        tokens = self.sizes.prefix + self.sizes.patches
        return super().sequences(cell) | {"decoder": (self.decoder_blocks, self.sizes.decoder_heads, tokens, tokens)}


class PlainGatherMAE(PlainMAE):
    """Gather first, decode and score only what is predicted: fastmim's algorithm without its kernels."""

    def forward(self, images: Tensor, noise: Tensor, cell: Cell) -> Tensor:
        """Return the loss of normalised images (B, 3, H, W) with noise (B, L)."""
        kept, predicted = self.sizes.visible(cell), self.sizes.predicted(cell)
        ids_shuffle = noise.argsort(1)
        return self.score(images, Ids(ids_shuffle[:, :kept], ids_shuffle[:, kept : kept + predicted], None))

    def score(self, images: Tensor, ids: Ids) -> Tensor:
        """Return the loss of normalised images."""
        patches = Patches(images, self.sizes)
        pred = self.predict(patches, ids)
        return self.error(pred, patches.pick(ids.predict), ids)

    def predict(self, patches: "Patches", ids: Ids) -> Tensor:
        """Predict patches: (B, M, P)."""
        return self.decode(self.encode(self.embed(patches, ids.keep)), ids)

    def decode(self, x: Tensor, ids: Ids) -> Tensor:
        """Predict patches from what `encode` returns: (B, M, P)."""
        prefix, positions = self.sizes.prefix, self.decoder_pos_embed[0]
        removed = self.mask_token + positions[prefix + ids.predict]
        x = torch.cat([x[:, :prefix] + positions[:prefix], x[:, prefix:] + positions[prefix + ids.keep], removed], 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, queries=ids.predict.shape[1])
        return self.decoder_pred(self.decoder_norm(x))

    def error(self, pred: Tensor, target: Tensor, ids: Ids) -> Tensor:
        """Return the loss of predictions (B, M, P) of patches (B, M, 3, p, p)."""
        return squared_error(pred, target.permute(0, 1, 3, 4, 2).reshape(pred.shape)).mean()

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        predicted, heads = self.sizes.predicted(cell), self.sizes.decoder_heads
        tokens = self.sizes.prefix + self.sizes.visible(cell) + predicted
        return super().sequences(cell) | {
            "decoder": (self.decoder_blocks[:-1], heads, tokens, tokens),
            "last block": (self.decoder_blocks[-1:], heads, predicted, tokens),
        }


class Patches:
    """Patches of images or clips, which are copied where they are picked.

    Args:
        images: (B, 3, *size).
    """

    def __init__(self, images: Tensor, sizes: Sizes) -> None:
        self.grid = patch_grid(images, *sizes.patch_shape)
        self.rows = torch.arange(len(images), device=images.device)[:, None]

    def pick(self, ids: Tensor) -> Tensor:
        """Return the patches ids (B, K): (B, K, 3, *patch)."""
        places = []
        for size in reversed(self.grid.shape[2 : self.grid.dim() // 2]):
            places.insert(0, ids % size)
            ids = ids // size
        return self.grid[(self.rows, ids, *places)]


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Return errors (B, M) of pred to target (B, M, P), normalised by each patch's own mean and deviation."""
    var, mean = torch.var_mean(target, -1, keepdim=True)
    return (pred - (target - mean) * (var + 1e-6).rsqrt()).square().mean(-1)


def patch_grid(images: Tensor, *patch: int) -> Tensor:
    """View images (B, 3, *size) as (B, *grid, 3, *patch); one number is the side of a square."""
    patch = patch * 2 if len(patch) == 1 else patch
    axes = len(patch)
    for axis, side in reversed(list(enumerate(patch, 2))):
        images = images.unflatten(axis, (-1, side))
    return images.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
