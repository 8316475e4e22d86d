"""A masked autoencoder in plain PyTorch, in the two forms that fastmim is measured against.

Written from the formulas of He et al., "Masked autoencoders are scalable vision learners" (CVPR 2022);
parameters are named as in facebookresearch/mae. Letters: B batch, L patches, K visible, M predicted,
D width, S sequence length, P values of a patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.attention_forms import fastest, sdpa
from rivals.sizes import Cell, Sizes


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


class PlainMAE(nn.Module):
    """Embed every patch, decode and score every token, as facebookresearch/mae does."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, sizes.width, sizes.patch, sizes.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.patches, sizes.width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        decoder_width = sizes.decoder_width
        self.decoder_embed = nn.Linear(sizes.width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.patches, decoder_width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, sizes.decoder_heads) for _ in range(sizes.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, sizes.values)

    def forward(self, images: Tensor, noise: Tensor, cell: Cell) -> Tensor:
        """Return the loss of normalised images (B, 3, H, W) with noise (B, L)."""
        batch, kept = len(images), self.sizes.visible(cell)
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        ids_shuffle = noise.argsort(1)
        ids_restore = ids_shuffle.argsort(1)
        x = x.gather(1, ids_shuffle[:, :kept, None].expand(-1, -1, x.shape[2]))
        mask = (ids_restore >= kept).float()

        x = self.encode(x)

        removed = self.mask_token.expand(batch, noise.shape[1] - kept, -1)
        tokens = torch.cat([x[:, 1:], removed], 1)
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        x = torch.cat([x[:, :1], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]

        error = squared_error(pred, patch_grid(images, self.sizes.patch).permute(0, 1, 2, 4, 5, 3).reshape(pred.shape))
        return (error * mask).sum() / mask.sum()

    def encode(self, x: Tensor) -> Tensor:
        """Encode visible tokens (B, K, D) to (B, 1+K, decoder width), class token first."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], 1)
        for block in self.blocks:
            x = block(x)
        return self.decoder_embed(self.norm(x))

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        visible, tokens = 1 + self.sizes.visible(cell), 1 + self.sizes.patches
        return {
            "encoder": (self.blocks, self.sizes.heads, visible, visible),
            "decoder": (self.decoder_blocks, self.sizes.decoder_heads, tokens, tokens),
        }

    def choose_attention(self, cell: Cell, batch: int, dtype: torch.dtype, compiled: bool) -> str:
        """Give every block the faster form for its shape; return the choice in words."""
        device = self.cls_token.device.type
        chosen = {}
        for name, (blocks, heads, queries, keys) in self.sequences(cell).items():
            head_dim = blocks[0].attn.head_dim
            attend = fastest(batch, heads, queries, keys, head_dim, dtype, device, compiled)
            chosen[name] = attend.__name__
            for block in blocks:
                block.attn.attend = attend
        return ", ".join(f"{name} {form}" for name, form in chosen.items())


class PlainGatherMAE(PlainMAE):
    """Gather first, decode and score only what is predicted: fastmim's algorithm without its kernels."""

    def forward(self, images: Tensor, noise: Tensor, cell: Cell) -> Tensor:
        """Return the loss of normalised images (B, 3, H, W) with noise (B, L)."""
        batch, kept, predicted = len(images), self.sizes.visible(cell), self.sizes.predicted(cell)
        ids_shuffle = noise.argsort(1)
        ids_keep, ids_predict = ids_shuffle[:, :kept], ids_shuffle[:, kept : kept + predicted]
        patches, rows = patch_grid(images, self.sizes.patch), torch.arange(batch, device=images.device)[:, None]
        columns = patches.shape[2]

        visible = patches[rows, ids_keep // columns, ids_keep % columns].flatten(2)
        proj = self.patch_embed.proj
        x = F.linear(visible, proj.weight.flatten(1), proj.bias) + self.pos_embed[0, 1:][ids_keep]

        x = self.encode(x)

        positions = self.decoder_pos_embed[0]
        removed = self.mask_token + positions[1 + ids_predict]
        x = torch.cat([x[:, :1] + positions[:1], x[:, 1:] + positions[1 + ids_keep], removed], 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, queries=predicted)
        pred = self.decoder_pred(self.decoder_norm(x))

        target = patches[rows, ids_predict // columns, ids_predict % columns]
        return squared_error(pred, target.permute(0, 1, 3, 4, 2).reshape(pred.shape)).mean()

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        visible, predicted = 1 + self.sizes.visible(cell), self.sizes.predicted(cell)
        tokens, heads = visible + predicted, self.sizes.decoder_heads
        return {
            "encoder": (self.blocks, self.sizes.heads, visible, visible),
            "decoder": (self.decoder_blocks[:-1], heads, tokens, tokens),
            "last block": (self.decoder_blocks[-1:], heads, predicted, tokens),
        }


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Return errors (B, M) of pred to target (B, M, P), normalised by each patch's own mean and deviation."""
    var, mean = torch.var_mean(target, -1, keepdim=True)
    return (pred - (target - mean) * (var + 1e-6).rsqrt()).square().mean(-1)


def patch_grid(images: Tensor, patch: int) -> Tensor:
    """View images (B, 3, H, W) as (B, rows, columns, 3, patch, patch)."""
    return images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
