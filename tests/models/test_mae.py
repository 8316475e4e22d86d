"""Results of the masked autoencoder, against functions written from the paper; its output and methods."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree
from cases import Errors, check_draws
from mae_from_paper import (
    VARIANTS,
    assert_exact,
    build,
    gradients,
    overlapping,
    pick,
    pictures,
    plain_dual,
    plain_encoder,
    plain_mae,
    plain_patchify,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmim
from fastmim import masking

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
    # as in facebookresearch/mae, images that require grad learn through the target too
    assert_exact(gradients(out.loss, model, images=images), gradients(loss, model, images=images))


def test_equals_the_plain_form_unmasked():
    model = build(img_size=(16, 40)).double()
    images = pictures(model)
    features = model.forward_features(images)
    assert features.shape == (2, 1 + 2 * 5, 32)
    assert_exact(features, plain_encoder(model, images))


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
    """Linear layers run on K = 4 visible or M = 3 of 12 predicted tokens, never on L = 16."""
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
    runs = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    loss = model(images, noise=noise).loss
    plain = gradients(loss, model)

    runs.clear()
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
    found, expected = (model(x, noise=noise) for x in (images, normalised))
    assert_exact(found.loss, expected.loss)
    assert_exact(found.pred, expected.pred)
    assert_exact(gradients(found.loss, model), gradients(expected.loss, model))
    assert_exact(model.forward_features(images), model.forward_features(normalised))
    assert_exact(
        model.forward_loss(images, expected.pred.new_zeros(2, 16, 64 * channels), expected.mask),
        model.forward_loss(normalised, expected.pred.new_zeros(2, 16, 64 * channels), expected.mask),
    )


def test_uint8_is_normalised_as_imagenet_by_default():
    model, noise = build(), torch.rand(2, 16)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model(images, noise=noise).loss, model(normalised, noise=noise).loss)


class Images(TorchDispatchMode):
    """Mode that records the images passed to embedding and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        index = {"fastmim::embed_patches": 0, "fastmim::pixel_loss": 1}.get(func._schema.name)
        if index is not None:
            self.seen.append((args[index].data_ptr(), args[index].stride()))
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


# ---- output ----------------------------------------------------------------------------------------------------------


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
    """The error against float64 is at most twice that of plain PyTorch in the same precision, by `check_draws`."""

    def error(values, truth):
        return sum((a.double() - b).square().sum() for a, b in zip(values, truth)).sqrt().item()

    model = build(norm_pix_loss=True)
    if how == "bfloat16":
        model = model.bfloat16()
    exact = copy.deepcopy(model).double()
    predictions, slopes = [], []
    for _ in range(5):
        images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
        with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
            out = model(images, noise=noise, predict="all")
            loss, pred, *_ = plain_mae(model, images, noise)
        assert out.loss.dtype == torch.float32 and out.pred.dtype == torch.bfloat16
        true_loss, true_pred, *_ = plain_mae(exact, images.double(), noise)
        ours, plain, truth = (
            list(gradients(value, m).values()) for value, m in ((out.loss, model), (loss, model), (true_loss, exact))
        )
        assert [g.dtype for g in ours] == [g.dtype for g in plain]
        predictions.append(Errors(error([out.pred], [true_pred]), error([pred], [true_pred]), 0))
        slopes.append(Errors(error(ours, truth), error(plain, truth), 0))
    check_draws(predictions, "predictions")
    check_draws(slopes, "gradients")


def test_residual_stream_stays_float32_under_autocast():
    model, streams = build(), []
    for block in [*model.blocks, *model.decoder_blocks]:
        block.register_forward_hook(lambda module, args, stream: streams.append(stream[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pictures(model))
    assert streams == [torch.float32] * 4 and out.loss.dtype == torch.float32
