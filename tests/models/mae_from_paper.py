"""Small models, and plain functions of their weights written from the paper: embed all, shuffle, decode all."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim import Mask, MaskedAutoencoderViT, masking

SIZES = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=2,
    decoder_num_heads=4,
)  # fmt: skip
VARIANTS = {
    "square": dict(),
    "norm_pix": dict(norm_pix_loss=True),
    "oblong, 1 channel": dict(img_size=(24, 40), patch_size=(8, 4), in_chans=1, decoder_depth=1, norm_pix_loss=True),
    "14 channels": dict(img_size=16, patch_size=4, in_chans=14, depth=1, decoder_num_heads=1),
    "no qkv bias": dict(qkv_bias=False, mlp_ratio=1.5, decoder_mlp_ratio=2.5),
}


def build(**changes) -> MaskedAutoencoderViT:
    """Build a small float32 model with all parameters, frozen tables too, moved away from their initial values."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pictures(model: MaskedAutoencoderViT, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=model.cls_token.dtype)


def overlapping(batch: int) -> Mask:
    """Draw a mask with a running cell, in which some predicted patches are visible."""
    mask = masking.tube(batch, (1, 4, 4), 0.75)
    predict = masking.running_cell(batch, (1, 4, 4), 0.5)
    return masking.from_bool(mask.mask, predict=predict)


def gradients(loss: Tensor, model: nn.Module, **others: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all trainable parameters and of `others`, by name."""
    leaves = {**{name: p for name, p in model.named_parameters() if p.requires_grad}, **others}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


assert_exact = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


# ---- the plain form --------------------------------------------------------------------------------------------------


def pick(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def plain_patchify(model: MaskedAutoencoderViT, images: Tensor) -> Tensor:
    (h, w), (p, q) = model.patch_embed.grid_size, model.patch_embed.patch_size
    cut = images.reshape(len(images), -1, h, p, w, q)
    return torch.einsum("nchpwq->nhwpqc", cut).reshape(len(images), h * w, -1)


def plain_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def plain_block(block: nn.Module, x: Tensor, keys: Tensor | None) -> Tensor:
    attn, mlp, heads = block.attn, block.mlp, block.attn.num_heads
    q, k, v = F.linear(plain_norm(block.norm1, x), attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keys is None else keys[:, None, None])
    x = x + F.linear(out.transpose(1, 2).flatten(2), attn.proj.weight, attn.proj.bias)
    hidden = F.gelu(F.linear(plain_norm(block.norm2, x), mlp.fc1.weight, mlp.fc1.bias))
    return x + F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


def plain_blocks(blocks: nn.ModuleList, norm: nn.LayerNorm, x: Tensor, keys: Tensor | None = None) -> Tensor:
    for block in blocks:
        x = plain_block(block, x, keys)
    return plain_norm(norm, x)


def plain_encoder(model: MaskedAutoencoderViT, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    x = F.conv2d(images.to(weight.dtype), weight, bias, stride=model.patch_embed.patch_size).flatten(2).transpose(1, 2)
    x = x + model.pos_embed[:, 1:]
    if ids_keep is not None:
        x = pick(x, ids_keep)
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    return plain_blocks(model.blocks, model.norm, torch.cat([cls, x], dim=1))


def plain_decoder(model: MaskedAutoencoderViT, latent: Tensor, ids_restore: Tensor) -> Tensor:
    """Predict all patches, in grid order."""
    x = F.linear(latent, model.decoder_embed.weight, model.decoder_embed.bias)
    hidden = model.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
    patches = pick(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)
    x = torch.cat([x[:, :1], patches], dim=1) + model.decoder_pos_embed
    return model.decoder_pred(plain_blocks(model.decoder_blocks, model.decoder_norm, x)[:, 1:])


def plain_loss(model: MaskedAutoencoderViT, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    target = plain_patchify(model, images)
    if model.norm_pix_loss:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def plain_mae(model: MaskedAutoencoderViT, images: Tensor, noise: Tensor, mask_ratio: float = 0.75):
    """Return loss, pred (B, L, P), mask and ids_restore, computed as in facebookresearch/mae."""
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= len_keep).to(images.dtype)
    pred = plain_decoder(model, plain_encoder(model, images, ids_shuffle[:, :len_keep]), ids_restore)
    return plain_loss(model, images, pred, mask), pred, mask, ids_restore


def plain_dual(model: MaskedAutoencoderViT, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return loss and predictions (B, L, P) of a decoder over all patches whose attention masks out the unused ones."""
    batch, patches = len(images), mask.num_patches
    visible, predicted = (
        torch.zeros(batch, patches, dtype=torch.bool).scatter(1, ids, True) for ids in (mask.ids_keep, mask.ids_predict)
    )
    x = F.linear(plain_encoder(model, images, mask.ids_keep), model.decoder_embed.weight, model.decoder_embed.bias)
    slots = x.new_zeros(batch, patches, x.shape[-1])
    slots = slots.scatter(1, mask.ids_keep[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
    cls_pos, pos = model.decoder_pos_embed[:, :1], model.decoder_pos_embed[:, 1:]
    hidden = (model.mask_token + pos).expand(batch, -1, -1)
    x = torch.cat([x[:, :1] + cls_pos, slots + pos, hidden], dim=1)
    keys = torch.cat([torch.ones(batch, 1, dtype=torch.bool), visible, predicted], dim=1)
    x = plain_blocks(model.decoder_blocks, model.decoder_norm, x, keys)
    pred = model.decoder_pred(x[:, 1 + patches :])
    return plain_loss(model, images, pred, predicted & ~visible), pred
