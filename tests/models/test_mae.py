"""The masked autoencoder beside a plain one, written here from the paper's code: embed all, shuffle, decode all."""

import copy
import io
import math
import pickle
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import fastmim
from fastmim import Mask, MaskedAutoencoderViT, masking
from fastmim.models.pos_embed import sincos_2d

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
    """A small float32 model with every parameter, frozen tables too, away from its initial value."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pictures(model: MaskedAutoencoderViT, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=model.cls_token.dtype)


def gradients(loss: Tensor, model: nn.Module, **others: Tensor) -> dict[str, Tensor]:
    """Of every trainable parameter and of `others`, by name."""
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
    """All patches in grid order."""
    x = F.linear(latent, model.decoder_embed.weight, model.decoder_embed.bias)
    hidden = model.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
    patches = pick(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)
    x = torch.cat([x[:, :1], patches], dim=1) + model.decoder_pos_embed
    return model.decoder_pred(plain_blocks(model.decoder_blocks, model.decoder_norm, x)[:, 1:])


def plain_loss(model: MaskedAutoencoderViT, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    target = plain_patchify(model, images.detach())
    if model.norm_pix_loss:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def plain_mae(model: MaskedAutoencoderViT, images: Tensor, noise: Tensor, mask_ratio: float = 0.75):
    """loss, pred (B, L, P), mask and ids_restore as facebookresearch/mae computes them."""
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= len_keep).to(images.dtype)
    pred = plain_decoder(model, plain_encoder(model, images, ids_shuffle[:, :len_keep]), ids_restore)
    return plain_loss(model, images, pred, mask), pred, mask, ids_restore


def plain_dual(model: MaskedAutoencoderViT, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Loss and predictions (B, L, P) where attention sees [class, visible, predicted] among slots for everything."""
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


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, grid", [(768, (14, 14)), (1280, (16, 16)), (32, (3, 5)), (12, (7, 1)), (4, (1, 1))])
def test_position_table_is_bit_equal(dim, grid):
    height, width = grid
    column, row = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))

    def encode(position):
        omega = np.arange(dim // 4, dtype=np.float64)
        omega /= dim / 4.0
        out = np.einsum("m,d->md", position.reshape(-1), 1.0 / 10000**omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    expected = np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)
    table = sincos_2d(dim, grid, num_prefix_tokens=1)
    assert table.dtype == torch.float32
    assert np.array_equal(table.numpy(), np.concatenate([np.zeros((1, dim), np.float32), expected]))


def test_position_tables_of_a_model_are_fixed():
    model = MaskedAutoencoderViT(**{**SIZES, "img_size": (24, 40)})
    for table, dim in ((model.pos_embed, 32), (model.decoder_pos_embed, 16)):
        assert not table.requires_grad
        assert torch.equal(table[0], sincos_2d(dim, (3, 5), num_prefix_tokens=1))


def test_initial_distributions():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, "embed_dim": 128, "decoder_embed_dim": 96})
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert weights["blocks.0.attn.qkv"].shape == (3 * 128, 128)  # one matrix: its fan differs from three
    weights["patch_embed.proj"] = model.patch_embed.proj.weight.flatten(1)
    for name, weight in weights.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()) and not module.bias.any() and module.eps == 1e-6
    assert 0 < model.patch_embed.proj.bias.abs().max() <= 1 / math.sqrt(3 * 8 * 8)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2) and abs(token.mean().item()) < 0.008


def test_initialize_weights_draws_all_anew():
    """A model materialised from the meta device has no other way to its initial weights."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.initialize_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def checkpoint_shapes(
    *, embed_dim, depth, decoder_embed_dim, decoder_depth, patch_size, img_size, in_chans=3, **_
) -> dict[str, tuple[int, ...]]:
    """The state dict of facebookresearch/mae: names and shapes."""

    def pair(name, out, *into):
        return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}

    def blocks(name, dim, count):
        for i in range(count):
            for part, shape in {
                "norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
                "norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
            }.items():  # fmt: skip
                yield from pair(f"{name}.{i}.{part}", *shape).items()

    rows, width = (img_size // patch_size) ** 2 + 1, decoder_embed_dim
    return {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, rows, embed_dim),
        **pair("patch_embed.proj", embed_dim, in_chans, patch_size, patch_size),
        **dict(blocks("blocks", embed_dim, depth)),
        **pair("norm", embed_dim),
        **pair("decoder_embed", width, embed_dim),
        "mask_token": (1, 1, width),
        "decoder_pos_embed": (1, rows, width),
        **dict(blocks("decoder_blocks", width, decoder_depth)),
        **pair("decoder_norm", width),
        **pair("decoder_pred", patch_size**2 * in_chans, width),
    }


@pytest.mark.parametrize(
    "name, embed_dim, depth, heads, decoder_embed_dim, decoder_depth, decoder_heads",
    [
        ("tiny_patch16", 192, 12, 3, 192, 4, 6),
        ("small_patch16", 384, 12, 6, 256, 4, 8),
        ("base_patch16", 768, 12, 12, 512, 8, 16),
        ("large_patch16", 1024, 24, 16, 512, 8, 16),
        ("huge_patch14", 1280, 32, 16, 512, 8, 16),
    ],
)
def test_sizes(name, embed_dim, depth, heads, decoder_embed_dim, decoder_depth, decoder_heads):
    with torch.device("meta"):
        model = getattr(fastmim, f"mae_vit_{name}")(norm_pix_loss=True)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == checkpoint_shapes(
        embed_dim=embed_dim,
        depth=depth,
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        patch_size=int(name[-2:]),
        img_size=224,
    )
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {decoder_heads}
    assert model.norm_pix_loss


def test_a_model_is_built_on_the_device_of_the_context():
    with torch.device("meta"):
        model = MaskedAutoencoderViT(**SIZES)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu").initialize_weights()
    assert torch.equal(model.pos_embed, MaskedAutoencoderViT(**SIZES).pos_embed)


def test_a_checkpoint_loads_strictly():
    state = {key: torch.randn(shape) for key, shape in checkpoint_shapes(**SIZES).items()}
    model = MaskedAutoencoderViT(**SIZES)
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "pos_embed",
        "decoder_pos_embed",
    ]


def test_saved_loaded_and_saved_again_is_identical():
    def saved(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.getvalue()

    first = saved(build())
    other = MaskedAutoencoderViT(**SIZES)
    assert saved(other) != first
    other.load_state_dict(torch.load(io.BytesIO(first), weights_only=True))
    assert saved(other) == first


# ---- the exact savings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["masked", "all"])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.9, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_plain_form(variant, mask_ratio, predict):
    model = build(**VARIANTS[variant]).double()
    images = pictures(model).requires_grad_()
    noise = torch.rand(2, model.patch_embed.num_patches, dtype=torch.float64)
    out = model(images, mask_ratio=mask_ratio, noise=noise, predict=predict)
    loss, pred, mask, ids_restore = plain_mae(model, images, noise, mask_ratio)

    assert torch.equal(out.mask.double(), mask) and torch.equal(out.ids_restore, ids_restore)
    assert_exact(out.pred, pred if predict == "all" else pick(pred, out.ids_predict))
    assert_exact(out.loss, loss)
    # an image learns through the embedding only: the target carries no gradient
    assert_exact(gradients(out.loss, model, images=images), gradients(loss, model, images=images))


def test_equals_the_plain_form_unmasked():
    model = build(img_size=(16, 40)).double()
    images = pictures(model)
    features = model.forward_features(images)
    assert features.shape == (2, 1 + 2 * 5, 32)
    assert_exact(features, plain_encoder(model, images))


def overlapping(batch: int) -> Mask:
    """Running cell: some predicted patches are visible."""
    mask = masking.tube(batch, (1, 4, 4), 0.75)
    predict = masking.running_cell(batch, (1, 4, 4), 0.5)
    return masking.from_bool(mask.mask, predict=predict)


@pytest.mark.parametrize("variant", ["square", "norm_pix"])
@pytest.mark.parametrize(
    "draw",
    [
        partial(masking.random, num_patches=16, mask_ratio=0.75, decode_ratio=0.5),
        partial(masking.random, num_patches=16, len_keep=1, decode_ratio=0.01),
        overlapping,
    ],
    ids=["half of the removed", "one visible, one predicted", "running cell"],
)
def test_dual_masking_equals_attention_over_what_is_decoded(draw, variant):
    model = build(**VARIANTS[variant]).double()
    images, mask = pictures(model, 3), draw(3)
    out = model(images, mask=mask)
    loss, pred = plain_dual(model, images, mask)
    assert_exact(out.pred, pick(pred, mask.ids_predict))
    assert_exact(out.loss, loss)
    assert_exact(gradients(out.loss, model), gradients(loss, model))


def test_decode_ratio_is_the_mask_of_that_ratio():
    model, noise = build(), torch.rand(2, 16)
    images = pictures(model)
    asked = model(images, decode_ratio=0.3, noise=noise)
    given = model(images, mask=masking.random(2, 16, 0.75, decode_ratio=0.3, noise=noise))
    assert asked.pred.shape == (2, round(0.3 * 12), 3 * 8 * 8)
    assert all(map(torch.equal, pytree.tree_leaves(asked), pytree.tree_leaves(given)))


def test_predicted_patches_that_are_visible_carry_no_loss():
    model = build()
    images, removed = pictures(model), torch.arange(16).expand(2, -1) >= 8
    out = model(images, mask=masking.from_bool(removed, predict=torch.arange(16).expand(2, -1) < 8))
    assert (
        out.pred.shape == (2, 8, 192) and out.loss == 0 and not any(map(torch.any, gradients(out.loss, model).values()))
    )


def test_work_is_proportional_to_visible_and_predicted_tokens():
    """Tokens that enter each linear layer, K = 4 visible and M = 3 of 12 predicted: never L = 16."""
    model, rows = build(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: args[0].shape[1]}))
    model(pictures(model), mask_ratio=0.75, decode_ratio=0.25)
    visible, decoded, predicted = 1 + 4, 1 + 4 + 3, 3
    expected = {"decoder_embed": visible, "decoder_pred": predicted}
    for i, last in enumerate((decoded, predicted)):
        for part in ("attn.proj", "mlp.fc2"):
            expected |= {f"blocks.{i}.{part}": visible, f"decoder_blocks.{i}.{part}": last}
    assert {name: rows.get(name) for name in expected} == expected


@pytest.mark.parametrize("sizes", [dict(depth=0), dict(decoder_depth=0), dict(depth=0, decoder_depth=0)], ids=str)
@pytest.mark.parametrize("predict", ["masked", "all"])
def test_no_blocks(sizes, predict):
    model = build(**sizes).double()
    images, noise = pictures(model), torch.rand(2, 16, dtype=torch.float64)
    out = model(images, noise=noise, predict=predict)
    loss, pred, *_ = plain_mae(model, images, noise)
    assert_exact(out.loss, loss)
    assert_exact(out.pred, pred if predict == "all" else pick(pred, out.ids_predict))


def test_activation_checkpointing_is_bit_equal():
    model = build()
    images, noise = pictures(model), torch.rand(2, 16)
    loss = model(images, noise=noise).loss
    plain = gradients(loss, model)

    runs = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.set_grad_checkpointing()
    recomputed = model(images, noise=noise).loss
    assert torch.equal(recomputed, loss)
    assert all(map(torch.equal, gradients(recomputed, model).values(), plain.values()))
    assert len(runs) == 2
    model.eval()(images, noise=noise).loss.backward()
    assert len(runs) == 3
    model.train().set_grad_checkpointing(False)
    model(images, noise=noise).loss.backward()
    assert len(runs) == 4


def test_an_empty_batch():
    model = build()
    out = model(pictures(model, 0))
    assert out.loss == 0 and out.pred.shape == (0, 12, 192) and out.mask.shape == (0, 16)
    assert not any(map(torch.any, gradients(out.loss, model).values()))
    assert model.forward_features(pictures(model, 0)).shape == (0, 17, 32)
    assert model.reconstruct(pictures(model, 0), out).shape == (0, 3, 32, 32)


def test_norm_layer_is_used():
    model = build(norm_layer=partial(nn.LayerNorm, eps=0.5))
    images, noise = pictures(model), torch.rand(2, 16)
    loss = model(images, noise=noise).loss
    assert not torch.allclose(loss, plain_mae(model, images, noise)[0])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    torch.testing.assert_close(model(images, noise=noise).loss, plain_mae(model, images, noise)[0])


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 14])
def test_uint8_equals_normalised_float(channels, norm_pix):
    # halves and quarters, so that the constants are the same in any precision
    mean, std = [0.25 * (i % 4) for i in range(channels)], [0.5 + 0.25 * (i % 3) for i in range(channels)]
    model = build(in_chans=channels, mean=mean, std=std, norm_pix_loss=norm_pix).double()
    images = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    normalised = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    noise = torch.rand(2, 16)
    narrow, wide = (model(x, noise=noise) for x in (images, normalised))
    assert_exact(narrow.loss, wide.loss)
    assert_exact(narrow.pred, wide.pred)
    assert_exact(gradients(narrow.loss, model), gradients(wide.loss, model))
    assert_exact(model.forward_features(images), model.forward_features(normalised))
    assert_exact(
        model.forward_loss(images, wide.pred.new_zeros(2, 16, 64 * channels), wide.mask),
        model.forward_loss(normalised, wide.pred.new_zeros(2, 16, 64 * channels), wide.mask),
    )


def test_uint8_is_normalised_as_imagenet_by_default():
    model, noise = build(), torch.rand(2, 16)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model(images, noise=noise).loss, model(normalised, noise=noise).loss)


class Images(TorchDispatchMode):
    """The images that embedding and loss are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = {"fastmim::embed_patches": 0, "fastmim::pixel_loss": 1}.get(func._schema.name)
        if place is not None:
            self.seen.append((args[place].data_ptr(), args[place].stride()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], dim=3)[..., 5 : 5 + x.shape[3]],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.transpose(2, 3),
    ],
    ids=["channels_last", "a crop", "expanded", "transposed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_images_of_any_layout_are_read_in_place(layout, dtype):
    model, noise = build(), torch.rand(2, 16)
    images = layout(torch.randint(0, 256, (2, 3, 32, 32)).to(dtype))
    assert not images.is_contiguous()
    with Images() as read:
        out = model(images, noise=noise)
    assert read.seen == [(images.data_ptr(), images.stride())] * 2
    assert torch.equal(out.loss, model(images.contiguous(), noise=noise).loss)


# ---- facebookresearch/mae's methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_methods_of_the_original_agree_with_forward(variant):
    model = build(**VARIANTS[variant]).double()
    images = pictures(model)
    latent, mask, ids_restore = model.forward_encoder(images, 0.75)
    pred = model.forward_decoder(latent, ids_restore)
    loss = model.forward_loss(images, pred, mask)
    out = model(images, 0.75, noise=ids_restore.double(), predict="all")
    assert mask.dtype == torch.float32 and torch.equal(mask, out.mask)
    assert torch.equal(ids_restore, out.ids_restore)
    assert_exact(latent, plain_encoder(model, images, out.ids_keep))
    assert_exact(pred, out.pred)
    assert_exact(loss, out.loss)
    assert_exact(gradients(loss, model), gradients(out.loss, model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_patchify_and_back(variant):
    model = build(**VARIANTS[variant])
    images = pictures(model, 3)
    patches = model.patchify(images)
    assert torch.equal(patches, plain_patchify(model, images))
    assert torch.equal(model.unpatchify(patches), images)


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_output_unpacks_and_is_a_pytree():
    model = build()
    out = model(pictures(model), decode_ratio=0.5)
    loss, pred, mask = out
    assert loss is out.loss is out[0] and pred is out.pred is out[1] and mask is out.mask is out[-1] and len(out) == 3

    assert [leaf.shape for leaf in pytree.tree_leaves(out)] == [(), (2, 6, 192), (2, 16), (2, 4), (2, 6), (2, 16)]
    again = pytree.tree_map(lambda tensor: tensor.detach().clone(), out)
    assert type(again) is fastmim.MAEOutput and not again.loss.requires_grad
    for name in ("loss", "pred", "mask", "ids_keep", "ids_predict", "ids_restore"):
        assert torch.equal(getattr(again, name), getattr(out, name))


def test_mask_is_1_where_removed():
    model = build()
    out = model(pictures(model), mask_ratio=0.6)
    assert out.mask.dtype == torch.float32 and out.loss.dtype == torch.float32
    assert {ids.dtype for ids in (out.ids_keep, out.ids_predict, out.ids_restore)} == {torch.int64}
    assert out.mask.sum(1).tolist() == [16 - int(16 * (1 - 0.6))] * 2
    assert not out.mask.gather(1, out.ids_keep).any() and out.mask.gather(1, out.ids_predict).all()


def test_masks_differ_between_rows_and_calls_and_follow_the_seed():
    model = build()
    images = pictures(model, 8)
    torch.manual_seed(1)
    first, second = model(images).mask, model(images).mask
    torch.manual_seed(1)
    assert torch.equal(model(images).mask, first) and not torch.equal(second, first)
    assert len(first.unique(dim=0)) > 1


@pytest.mark.parametrize("predict", ["masked", "all"])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_perfect_predictions_give_the_picture_back(dtype, norm_pix, predict):
    model = build(img_size=(16, 40), norm_pix_loss=norm_pix)
    mean, std = (torch.tensor(stat)[:, None, None] for stat in (model.mean, model.std))
    original = torch.randint(0, 256, (2, 3, 16, 40), dtype=torch.uint8)
    normalised = (original / 255 - mean) / std
    images = original if dtype == torch.uint8 else normalised
    out = model(images, mask_ratio=0.7, decode_ratio=1.0 if predict == "all" else 0.5, predict=predict)
    target = plain_patchify(model, normalised)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    out.pred = target if predict == "all" else pick(target, out.ids_predict)

    shown = torch.zeros(2, 10, 1).scatter(1, torch.cat([out.ids_keep, out.ids_predict], dim=1)[..., None], 1)
    assert shown.all() == (predict == "all")
    expected = torch.where(shown.bool(), plain_patchify(model, original / 255), 0.5)
    picture = model.reconstruct(images, out)
    assert picture.dtype == torch.float32
    torch.testing.assert_close(plain_patchify(model, picture), expected, rtol=0, atol=1e-5)


def test_reconstruction_pastes_visible_patches_and_stays_in_range():
    model = build(in_chans=2)
    images = torch.rand(2, 2, 32, 32)  # no mean and std: taken as they are
    out = model(images, mask=overlapping(2))
    out.pred = torch.randn_like(out.pred) * 100
    picture = model.reconstruct(images, out)
    assert picture.min() == 0 and picture.max() == 1 and not picture.requires_grad
    patches = plain_patchify(model, picture)
    assert torch.equal(pick(patches, out.ids_keep), pick(plain_patchify(model, images), out.ids_keep))


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_narrow_precision_is_as_exact_as_the_plain_form(how):
    """Error against float64 at most twice that of plain PyTorch in the same precision."""
    model = build(norm_pix_loss=True)
    if how == "bfloat16":
        model = model.bfloat16()
    exact = copy.deepcopy(model).double()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        out = model(images, noise=noise, predict="all")
        loss, pred, *_ = plain_mae(model, images, noise)
    assert out.loss.dtype == torch.float32 and out.pred.dtype == torch.bfloat16
    true_loss, true_pred, *_ = plain_mae(exact, images.double(), noise)

    def error(values, truth):
        return sum((a.double() - b).square().sum() for a, b in zip(values, truth)).sqrt()

    ours, plain, truth = (
        list(gradients(value, m).values()) for value, m in ((out.loss, model), (loss, model), (true_loss, exact))
    )
    assert [g.dtype for g in ours] == [g.dtype for g in plain]
    assert error([out.pred], [true_pred]) <= 2 * error([pred], [true_pred])
    assert error(ours, truth) <= 2 * error(plain, truth)


def test_residual_stream_stays_wide_under_autocast():
    model, streams = build(), []
    for block in [*model.blocks, *model.decoder_blocks]:
        block.register_forward_hook(lambda module, args, stream: streams.append(stream[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pictures(model))
    assert streams == [torch.float32] * 4 and out.loss.dtype == torch.float32


# ---- compile, export, copies, many processes -------------------------------------------------------------------------


def draw(case: str) -> tuple[Tensor, dict]:
    images = torch.randn(2, 3, 32, 32)
    if case == "uint8":
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    if case == "no noise":
        return images, {}
    if case == "mask":
        return images, dict(mask=overlapping(2))
    return images, dict(noise=torch.rand(2, 16), predict="all" if case == "all" else "masked")


@pytest.mark.parametrize(
    "case, backend",
    [
        ("noise", "inductor"),
        # what the compiler captures doesn't depend on the backend; this one generates no code
        *((case, "aot_eager") for case in ("no noise", "mask", "all", "uint8", "autocast", "checkpointing")),
    ],
)
def test_compiled_equals_eager_and_is_compiled_once(case, backend):
    torch.compiler.reset()
    model = build(depth=1, decoder_depth=1, norm_pix_loss=True)
    model.set_grad_checkpointing(case == "checkpointing")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with autocast:
        compiled(*draw(case)[:1], **draw(case)[1]).loss.backward()
    with autocast, torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            images, arguments = draw(case)
            results = []
            for run in (compiled, model):
                torch.manual_seed(seed)
                out = run(images, **arguments)
                results.append((pytree.tree_leaves(out), gradients(out.loss, model)))
            if case != "autocast":
                for ours, theirs in zip(*map(pytree.tree_leaves, results)):
                    assert (ours - theirs).double().norm() <= 1e-5 * theirs.double().norm()
                continue
            # each rounds in its own places: eager is no further from float32 than what the compiler captured
            with torch.autocast("cpu", enabled=False):
                torch.manual_seed(seed)
                out = model(images, **arguments)
                exact = pytree.tree_leaves(out), gradients(out.loss, model)
            for captured, eager, truth in zip(*map(pytree.tree_leaves, (*results, exact))):
                far, near, size = (x.double().norm() for x in (captured - truth, eager - truth, truth))
                assert far <= 3e-2 * size and near <= far + 1e-3 * size


def test_export(tmp_path):
    model = build(depth=1, decoder_depth=1)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model,
        (pictures(model),),
        dict(noise=torch.rand(2, 16)),
        dynamic_shapes=dict(images={0: batch}, noise={0: batch}),
    )
    torch.export.save(program, tmp_path / "mae.pt2")
    images, noise = pictures(model, 3), torch.rand(3, 16)
    out = torch.export.load(tmp_path / "mae.pt2").module()(images, noise=noise)
    assert type(out) is fastmim.MAEOutput
    torch.testing.assert_close(pytree.tree_leaves(out), pytree.tree_leaves(model(images, noise=noise)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_same_and_separate(copied):
    model = build(norm_pix_loss=True)
    images, noise = pictures(model), torch.rand(2, 16)
    other = copied(model)
    assert torch.equal(other(images, noise=noise).loss, model(images, noise=noise).loss)
    with torch.no_grad():
        other.cls_token.add_(1)
    assert not torch.equal(other.cls_token, model.cls_token)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: MaskedAutoencoderViT) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in [*model.blocks, *model.decoder_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("parallel", [distributed, sharded])
def test_two_steps_in_parallel_equal_two_alone(parallel, one_process):
    """Without flags for unused parameters: every one of them has a gradient at every step."""
    alone = build()
    together = parallel(copy.deepcopy(alone))
    for _ in range(2):
        images, noise = pictures(alone), torch.rand(2, 16)
        for model in (alone, together):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(images, noise=noise, decode_ratio=0.5).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(together.parameters(), alone.parameters()):
        assert torch.equal(ours.full_tensor() if parallel is sharded else ours, theirs)


# ---- bad input -------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = Mask(torch.full((2, 1), 99), torch.zeros(2, 1, dtype=torch.int64), torch.arange(16).expand(2, -1), 16)


@pytest.fixture(scope="module")
def model():
    return build()


BAD_CALLS = [
    (dict(images=torch.zeros(3, 32, 32)), ValueError, r"images .*\(any, 3, 32, 32\).*got \(3, 32, 32\)"),
    (dict(images=torch.zeros(2, 4, 32, 32)), ValueError, r"images .*\(any, 3, 32, 32\).*got \(2, 4, 32, 32\)"),
    (dict(images=torch.zeros(2, 3, 32, 24)), ValueError, r"images .*\(any, 3, 32, 32\).*got \(2, 3, 32, 24\)"),
    (dict(images=torch.ones(2, 3, 32, 32).long()), TypeError, r"images .*uint8.*float32.*got torch.int64"),
    (dict(images=np.zeros((2, 3, 32, 32))), TypeError, r"images must be a torch.Tensor, got ndarray"),
    (dict(images=None), TypeError, r"images must be a torch.Tensor, got NoneType"),
    (dict(mask_ratio=0), ValueError, r"mask_ratio .*\(0, 1\).*got 0"),
    (dict(mask_ratio=1.0), ValueError, r"mask_ratio .*\(0, 1\).*got 1"),
    (dict(mask_ratio=-1), ValueError, r"mask_ratio .*\(0, 1\).*got -1"),
    (dict(mask_ratio=math.nan), ValueError, r"mask_ratio .*\(0, 1\).*got nan"),
    (dict(mask_ratio="x"), TypeError, r"mask_ratio must be a number, got str 'x'"),
    (dict(mask_ratio=0.95), ValueError, r"mask_ratio 0.95 keeps none of the 16"),
    (dict(mask_ratio=1e-17), ValueError, r"mask_ratio 1e-17 removes none of the 16"),
    (dict(decode_ratio=0), ValueError, r"decode_ratio .*\(0, 1\].*got 0"),
    (dict(decode_ratio=1.5), ValueError, r"decode_ratio .*\(0, 1\].*got 1.5"),
    (dict(decode_ratio=math.nan), ValueError, r"decode_ratio .*\(0, 1\].*got nan"),
    (dict(decode_ratio=None), TypeError, r"decode_ratio must be a number, got NoneType"),
    (dict(noise=torch.rand(2, 15)), ValueError, r"noise .*\(2, 16\).*got \(2, 15\)"),
    (dict(noise=torch.rand(3, 16)), ValueError, r"noise .*\(2, 16\).*got \(3, 16\)"),
    (dict(noise=torch.full((2, 16), math.nan)), ValueError, r"noise must not hold NaN"),
    (dict(noise=torch.ones(2, 16).long()), TypeError, r"noise .*float32.*got torch.int64"),
    (dict(noise=torch.rand(2, 16), mask=masking.random(2, 16, 0.5)), ValueError, r"noise or mask, not both"),
    (dict(mask=masking.random(3, 16, 0.5)), ValueError, r"mask must be of 2 images of 16 patches; got 3 of 16"),
    (dict(mask=masking.random(2, 15, 0.5)), ValueError, r"mask must be of 2 images of 16 patches; got 2 of 15"),
    (dict(mask=torch.zeros(2, 16)), TypeError, r"mask must be a fastmim.Mask.*got Tensor"),
    (dict(mask=OUT_OF_RANGE), ValueError, r"ids must be in 0..15; got 99"),
    (dict(predict="x"), ValueError, r'predict .*"masked".*"all".*got .x.'),
    (dict(predict="all", decode_ratio=0.5), ValueError, r'predict="all" needs decode_ratio 1.*got 6 of 12'),
]


def named(rows: list) -> list:
    """Rows of bad arguments as cases that pytest shows by those arguments; tensors by their type."""

    def shown(value):
        return str(value) if isinstance(value, int | float | str | list | tuple | None) else type(value).__name__

    return [
        pytest.param(*row, id=", ".join(f"{name}={shown(value)}" for name, value in row[0].items())) for row in rows
    ]


@pytest.mark.parametrize("arguments, error, said", named(BAD_CALLS))
def test_bad_calls_are_refused_and_change_nothing(model, arguments, error, said):
    images = torch.ones(2, 3, 32, 32)
    noise, state = torch.rand(2, 16), copy.deepcopy(model.state_dict())
    before = model(images, noise=noise).loss
    with pytest.raises(error, match=said):
        model(**{"images": images, **arguments})
    assert torch.equal(model(images, noise=noise).loss, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method, arguments, said",
    [
        ("forward_features", (torch.zeros(2, 3, 16, 16),), r"images .*\(any, 3, 32, 32\)"),
        ("forward_encoder", (torch.zeros(2, 3, 32, 32), 1.0), r"mask_ratio .*\(0, 1\)"),
        ("forward_decoder", (torch.zeros(2, 5, 32), torch.zeros(2, 15).long()), r"ids_restore .*16"),
        ("forward_loss", (torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, 5), torch.ones(2, 16)), r"pred .*192"),
        ("patchify", (torch.zeros(2, 3, 16, 16),), r"imgs .*\(any, 3, 32, 32\)"),
        ("unpatchify", (torch.zeros(2, 9, 192),), r"x .*\(any, 16, 192\)"),
        ("reconstruct", (torch.zeros(3, 32, 32), None), r"images .*\(any, 3, 32, 32\)"),
    ],
)
def test_bad_calls_of_methods_are_refused(model, method, arguments, said):
    with pytest.raises(ValueError, match=said):
        getattr(model, method)(*arguments)


def test_uint8_of_other_channel_counts_asks_for_constants():
    images = torch.zeros(2, 5, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"uint8 images of 5 channels need .*mean and std"):
        build(in_chans=5)(images)
    build(in_chans=5, mean=[0.5] * 5, std=[0.5] * 5)(images)


BAD_SIZES = [
    (dict(img_size=33), ValueError, r"img_size \(33, 33\).*multiple of patch_size \(8, 8\)"),
    (dict(img_size=(32, 36)), ValueError, r"img_size \(32, 36\).*multiple of patch_size"),
    (dict(img_size=(32,)), ValueError, r"img_size must be an int or one int per axis.*got \(32,\)"),
    (dict(img_size=32.0), ValueError, r"img_size must be an int.*got 32.0"),
    (dict(patch_size=0), ValueError, r"patch_size must be at least 1, got 0"),
    (dict(in_chans=0), ValueError, r"in_chans must be at least 1, got 0"),
    (dict(embed_dim=18), ValueError, r"\bembed_dim must be a multiple of 4.*got 18"),
    (dict(decoder_embed_dim=18, decoder_num_heads=1), ValueError, r"decoder_embed_dim .*multiple of 4.*got 18"),
    (dict(num_heads=3), ValueError, r"\bembed_dim must be a multiple of num_heads.*3.*got 32"),
    (dict(decoder_num_heads=3), ValueError, r"decoder_embed_dim .*multiple of decoder_num_heads.*3.*got 16"),
    (dict(num_heads=0), ValueError, r"num_heads must be at least 1, got 0"),
    (dict(depth=-1), ValueError, r"\bdepth must be at least 0, got -1"),
    (dict(mlp_ratio=-1.0), ValueError, r"mlp_ratio must be .*got -1"),
    (dict(mean=[0.5, 0.5]), ValueError, r"mean .*3 channels.*\[0.5, 0.5\]"),
    (dict(std=[1.0] * 4), ValueError, r"std .*3 channels"),
    (dict(std=[1, 0, 1]), ValueError, r"std must be positive.*\[1, 0, 1\]"),
    (dict(std=[1, math.nan, 1]), ValueError, r"std must be positive.*nan"),
    (dict(mean=[0, math.inf, 0]), ValueError, r"mean must be finite.*inf"),
    (dict(mean=0.5), TypeError, r"mean must be .*0.5"),
    (dict(mean="abc"), TypeError, r"mean must be .*abc"),
]


@pytest.mark.parametrize("arguments, error, said", named(BAD_SIZES))
def test_bad_sizes_are_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        MaskedAutoencoderViT(**{**SIZES, **arguments})
