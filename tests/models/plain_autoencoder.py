"""Small encoders and masked autoencoders, and plain functions of their weights: every patch is embedded and decoded.

Rows are computed one by one, so that a row of a ragged mask is what it is alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim import Encoder, Mask, MaskedAutoencoder, masking

SHAPES = {
    1: dict(img_size=(24,), patch_size=(3,), in_chans=2),
    2: dict(img_size=(12, 8), patch_size=(3, 4), in_chans=3),
    3: dict(img_size=(4, 8, 4), patch_size=(2, 4, 2), in_chans=1),
}
BLOCKS = dict(embed_dim=24, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
BATCH = 3


def build(axes: int = 2, kind: type[Encoder] = MaskedAutoencoder, **changes) -> Encoder:
    """Build a small float64 model with all parameters moved away from their initial values."""
    torch.manual_seed(0)
    options = SHAPES[axes] | BLOCKS | (DECODER if issubclass(kind, MaskedAutoencoder) else {})
    model = kind(**options | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def draw(model: Encoder, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.img_size, dtype=torch.float64)


def ragged(model: Encoder) -> Mask:
    """Return a mask of rows that keep 1, 2 and 3 patches and predict 2, 3 and 4 others."""
    order = torch.rand(BATCH, model.num_patches).argsort(1)
    rank = order.argsort(1)
    counts = torch.arange(BATCH)[:, None]
    kept = rank <= counts
    predicted = (rank > counts) & (rank <= 2 * counts + 2)
    return masking.from_bool(~kept, predict=predicted, ragged=True)


def masks(model: Encoder) -> dict[str, Mask]:
    return {
        "all": masking.random(BATCH, model.num_patches, 0.6),
        "some": masking.random(BATCH, model.num_patches, 0.6, decode_ratio=0.5),
        "ragged": ragged(model),
    }


def rows(mask: Mask) -> list[tuple[Tensor, Tensor]]:
    """Return the visible and predicted ids of each row, without padding."""
    keep = torch.ones_like(mask.ids_keep, dtype=torch.bool) if mask.valid_keep is None else mask.valid_keep
    predict = torch.ones_like(mask.ids_predict, dtype=torch.bool) if mask.valid_predict is None else mask.valid_predict
    return [(k[kv], p[pv]) for k, kv, p, pv in zip(mask.ids_keep, keep, mask.ids_predict, predict)]


# ---- the plain form, of one row --------------------------------------------------------------------------------------


def plain_angles(model: Encoder, head_dim: int) -> Tensor:
    """Return (N+L, A, n) angles: coordinate times 100^(-i/n), 0 for prefix tokens."""
    axes = len(model.grid_size)
    n = head_dim // (2 * axes)
    table = torch.zeros(model.num_prefix_tokens + model.num_patches, axes, n, dtype=torch.float64)
    for patch in range(model.num_patches):
        rest = patch
        for axis in reversed(range(axes)):
            rest, at = divmod(rest, model.grid_size[axis])
            table[model.num_prefix_tokens + patch, axis] = torch.tensor([at / 100 ** (i / n) for i in range(n)])
    return table.float().double()


def plain_rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotate x (H, S, D) by angles (S, A, n), as products of complex numbers."""
    if angles is None:
        return x
    axes, n = angles.shape[1:]
    parts = list(x.split([2 * n] * axes + [x.shape[2] - 2 * n * axes], -1))
    for axis in range(axes):
        turned = torch.complex(*parts[axis].chunk(2, -1)) * torch.exp(1j * angles[:, axis])
        parts[axis] = torch.cat([turned.real, turned.imag], -1)
    return torch.cat(parts, -1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, angles: tuple, seen: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    q, k = plain_rotate(q, angles[0]), plain_rotate(k, angles[1])
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def plain_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def plain_block(
    block: nn.Module,
    x: Tensor,
    memory: Tensor | None,
    angles: Tensor | None,
    memory_angles: Tensor | None,
    seen: Tensor,
) -> Tensor:
    if block.attn is not None:
        q, k, v = block.attn.qkv(plain_norm(block.norm1, x)).chunk(3, -1)
        x = x + block.attn.proj(plain_attention(q, k, v, block.attn.num_heads, (angles, angles), seen))
    if memory is not None:
        cross = block.cross_attn
        q = cross.q(plain_norm(block.norm_cross, x))
        k, v = cross.kv(plain_norm(block.norm_memory, memory)).chunk(2, -1)
        x = x + cross.proj(plain_attention(q, k, v, cross.num_heads, (angles, memory_angles)))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(plain_norm(block.norm2, x))))


def plain_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    *,
    memory: Tensor | None = None,
    angles: Tensor | None = None,
    memory_angles: Tensor | None = None,
    seen: Tensor | None = None,
) -> list[Tensor]:
    """Return the tokens before the first block and after each."""
    states = [x]
    for block in blocks:
        states.append(plain_block(block, states[-1], memory, angles, memory_angles, seen))
    return states


def plain_embed(model: Encoder, image: Tensor) -> Tensor:
    """Embed all patches of an image (C, *size): (L, D), without positions."""
    proj = model.patch_embed.proj
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[image.dim() - 1]
    return conv(image[None], proj.weight, proj.bias, stride=model.patch_size)[0].flatten(1).T


def plain_encoder(model: Encoder, image: Tensor, keep: Tensor | None = None) -> list[Tensor]:
    """Return the tokens [prefix; visible] before the first block and after each, without the norm."""
    n = model.num_prefix_tokens
    keep = torch.arange(model.num_patches) if keep is None else keep
    places = torch.cat([torch.arange(n), n + keep])
    x = plain_embed(model, image)[keep]
    if n:
        x = torch.cat([model.cls_token[0], x])
    if model.pos_embed is not None:
        x = x + model.pos_embed[0, places]
    angles = plain_angles(model, 12)[places] if model.position == "rope" else None
    return plain_blocks(model.blocks, x, angles=angles)


def plain_latent(model: Encoder, image: Tensor, keep: Tensor | None = None) -> Tensor:
    return plain_norm(model.norm, plain_encoder(model, image, keep)[-1])


def plain_predict(model: MaskedAutoencoder, image: Tensor, keep: Tensor, predict: Tensor, context: Tensor | None):
    """Predict the patches `predict` of one image (C, *size): (M, P), decoding every patch in grid order."""
    n, length = model.num_prefix_tokens, model.num_patches
    width = model.decoder_pred.in_features
    hidden = model.mask_token[0].expand(length, width)
    taken = torch.zeros(length, dtype=torch.bool).index_fill(0, torch.cat([keep, predict]), True)
    visible = torch.zeros(length, dtype=torch.bool).index_fill(0, keep, True)
    seen = torch.cat([torch.ones(n, dtype=torch.bool), taken])
    if model.decoder is None:
        x = torch.where(visible[:, None], plain_embed(model, image), hidden)
        x = x if model.cls_token is None else torch.cat([model.cls_token[0], x])
        x = x if model.pos_embed is None else x + model.pos_embed[0]
        angles = plain_angles(model, 12) if model.position == "rope" else None
        x = plain_norm(model.norm, plain_blocks(model.blocks, x, angles=angles, seen=seen)[-1])
        return model.decoder_pred(x[n:])[predict]
    latent = plain_latent(model, image, keep)
    table = 0 if model.decoder_pos_embed is None else model.decoder_pos_embed[0]
    angles = plain_angles(model, 8) if model.position == "rope" else None
    if model.decoder == "cross":
        x = hidden + (table if model.decoder_pos_embed is None else table[n:])
        memory_angles = None if angles is None else angles[torch.cat([torch.arange(n), n + keep])]
        options = dict(memory=latent, angles=None if angles is None else angles[n:], memory_angles=memory_angles)
        x = plain_norm(model.decoder_norm, plain_blocks(model.decoder_blocks, x, **options)[-1])
        return model.decoder_pred(x)[predict]
    narrow = model.decoder_embed(latent)
    x = torch.cat([narrow[:n], hidden.index_copy(0, keep, narrow[n:])]) + table
    memory = None if context is None else model.decoder_embed(context) + table
    states = plain_blocks(
        model.decoder_blocks,
        x,
        memory=memory,
        angles=angles,
        memory_angles=None if memory is None else angles,
        seen=seen,
    )
    return model.decoder_pred(plain_norm(model.decoder_norm, states[-1])[n:])[predict]


def plain_targets(model: MaskedAutoencoder, image: Tensor, norm: bool | str = False) -> Tensor:
    """Return the patches of an image (C, *size), (L, P), values in the order (*patch, c)."""
    channels = image.shape[0]
    cut = image[None]
    for axis, patch in enumerate(model.patch_size):
        cut = cut.unfold(2 + axis, patch, patch)
    axes = len(model.patch_size)
    cut = cut[0].flatten(1, axes).flatten(2).permute(1, 2, 0)  # (L, values of a channel, C)
    assert cut.shape[2] == channels
    if norm == "channel":
        cut = (cut - cut.mean(1, keepdim=True)) / (cut.var(1, keepdim=True).sqrt() + 1e-6)
    elif norm:
        cut = (cut - cut.mean((1, 2), keepdim=True)) / (cut.var((1, 2), keepdim=True) + 1e-6).sqrt()
    return cut.flatten(1)


def plain_forward(
    model: MaskedAutoencoder, images: Tensor, mask: Mask, context: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the predictions of each row."""
    found, errors = [], []
    for row, (keep, predict) in enumerate(rows(mask)):
        found.append(plain_predict(model, images[row], keep, predict, None if context is None else context[row]))
        hidden = ~torch.isin(predict, keep)
        target = plain_targets(model, images[row], model.norm_pix_loss)[predict]
        errors.append((found[-1] - target).square().mean(-1)[hidden])
    return torch.cat(errors).mean(), found
