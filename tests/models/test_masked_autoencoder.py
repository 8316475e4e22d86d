"""Masked autoencoders on 1 to 3 axes: each decoder against plain formulas, and the verbs that make up a step."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import BATCH, SHAPES, build, draw, masks, plain_forward, plain_targets, ragged, rows
from torch import Tensor, nn

import fastmim
from fastmim import MaskedAutoencoder, Patches, masking, ops

DECODERS = ("self", "cross", "both", None)


def context_of(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Return what the decoder needs beside images: the latent of a second view for "both"."""
    if model.decoder != "both":
        return {}
    return dict(context=model.encode(draw(model).to(model.mask_token.dtype)).detach().requires_grad_())


# ---- the results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "some", "ragged"])
@pytest.mark.parametrize(
    "axes, position, prefix, norm",
    [
        (1, "learned", 4, False),
        (2, "rope", 0, "channel"),
        (2, "sincos", 1, True),
        (3, "rope", 1, True),
        (3, "sincos", 16, "channel"),
        (1, "none", 0, True),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_equals_the_plain_form(decoder, axes, position, prefix, norm, kind):
    """Rows of a ragged mask equal the rows alone."""
    model = build(axes, decoder=decoder, pos_embed=position, num_prefix_tokens=prefix, norm_pix_loss=norm)
    images, mask, context = draw(model), masks(model)[kind], context_of(model)
    out = model(images, mask=mask, **context)
    loss, predictions = plain_forward(model, images, mask, **context)
    valid = torch.ones_like(out.ids_predict, dtype=torch.bool) if out.valid_predict is None else out.valid_predict
    for ours, used, expected in zip(out.pred, valid, predictions, strict=True):
        torch.testing.assert_close(ours[used], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    assert_exact(gradients(out.loss, model, **context), gradients(loss, model, **context))
    assert torch.equal(out.mask.bool(), mask.mask)


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_are_those_of_finite_differences(decoder):
    sizes = dict(embed_dim=8, depth=1, decoder_embed_dim=8, decoder_depth=1, pos_embed="learned")
    model = build(decoder=decoder, **sizes)
    images, mask, context = draw(model, 2), masking.random(2, 8, 0.75), context_of(model)
    context = {name: value[:2].detach() for name, value in context.items()}
    names, weights = zip(*model.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values)), (images,), dict(mask=mask, **context)).loss

    chosen = {"mask_token", "cls_token", "decoder_pred.bias", "blocks.0.attn.proj.bias"}
    weights = [w.detach().requires_grad_(name in chosen) for name, w in zip(names, weights)]
    assert torch.autograd.gradcheck(loss, weights)


def test_what_padding_holds_has_no_influence():
    """NaN in the patches that pad a row changes neither loss nor predictions nor gradients."""
    for decoder in DECODERS:
        model = build(decoder=decoder, norm_pix_loss=True)
        images, mask, context = draw(model), ragged(model), context_of(model)
        used = torch.zeros(BATCH, model.num_patches, dtype=torch.bool)
        for row, ids in enumerate(rows(mask)):
            used[row, torch.cat(ids)] = True
        patches = model.patchify(images)
        nodata = model.unpatchify(patches.where(used[..., None], torch.nan))
        assert nodata.isnan().any()
        assert torch.equal(model(nodata, mask=mask, **context).loss, model(images, mask=mask, **context).loss)
        pairs = zip(*(gradients(model(x, mask=mask, **context).loss, model).values() for x in (nodata, images)))
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["squared", "absolute", "huber"])
def test_kinds_of_loss(kind, reduction, axes):
    model = build(axes, loss=kind, norm_pix_loss="channel" if axes == 2 else False)
    images, mask = draw(model), masks(model)["some"]
    pred = model.predict(images, mask)
    plain = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.smooth_l1_loss}[kind]
    targets = torch.stack(
        [plain_targets(model, x, model.norm_pix_loss)[ids] for x, ids in zip(images, mask.ids_predict)]
    )
    errors = plain(pred, targets, reduction="none").mean(-1)
    weight = torch.rand_like(errors)
    for given in (None, weight):
        w = torch.ones_like(errors) if given is None else given
        expected = {"mean": (errors * w).sum() / w.sum(), "sum": (errors * w).sum(), "none": errors * w}[reduction]
        assert_exact(model.loss(pred, images, mask, reduction=reduction, weight=given), expected)


def test_visible_and_padded_predictions_have_no_loss():
    model = build()
    images = draw(model)
    predict = torch.arange(8).expand(BATCH, -1) < 4
    mask = masking.from_bool(torch.arange(8).expand(BATCH, -1) >= 2, predict=predict)
    errors = model.loss(model.predict(images, mask), images, mask, reduction="none")
    assert torch.equal(errors != 0, mask.ids_predict >= 2)
    mask = ragged(model)
    weight = torch.ones(mask.ids_predict.shape, dtype=torch.float64)
    errors = model.loss(model.predict(images, mask), images, mask, reduction="none", weight=weight)
    assert torch.equal(errors != 0, mask.valid_predict)


def test_codes_as_targets():
    """Predictions of another width, with a loss of the caller's."""
    model = build(out_dim=5)
    images, mask = draw(model), masks(model)["some"]
    scores = model.predict(images, mask)
    codes = torch.randint(0, 5, (BATCH, 8)).gather(1, mask.ids_predict)
    assert scores.shape == (BATCH, 2, 5)
    F.cross_entropy(scores.flatten(0, 1), codes.flatten()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"pred must have shape \(3, 2, 36\).*got \(3, 2, 5\)"):
        model(images, mask=mask)


def test_a_latent_for_each_block():
    """CrossMAE mixes the results of several encoder blocks, another mixture for each block of the decoder."""
    model = build(decoder="cross")
    images, mask = draw(model), masks(model)["all"]
    latent, taps = model.encode(images, mask, taps=(0, 1))
    assert_exact(model.decode([latent, latent], mask), model.decode(latent, mask))
    assert not torch.allclose(model.decode(taps, mask), model.decode(latent, mask))
    with pytest.raises(ValueError, match="one for each of the 2 decoder blocks; got 3"):
        model.decode([latent] * 3, mask)


def test_work_is_proportional_to_visible_and_predicted_tokens():
    """With "cross", only M predicted tokens are decoded; without a decoder the last block's MLP sees M tokens."""
    seen = {}
    for decoder, last in (("cross", "decoder_blocks.1"), (None, "blocks.1")):
        model = build(decoder=decoder)
        for name, module in model.named_modules():
            if name in (f"{last}.mlp.fc2", "decoder_pred", "decoder_blocks.0.mlp.fc2"):
                module.register_forward_pre_hook(
                    lambda _, args, key=(decoder, name): seen.update({key: args[0].shape[1]})
                )
        model(draw(model), mask_ratio=0.6, decode_ratio=0.5)
    assert len(seen) == 5 and set(seen.values()) == {2}


# ---- verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("enabled", [False, True])
def test_the_verbs_make_up_forward(decoder, enabled):
    """By hand the same bits, and the same dtypes under autocast, as in one call."""
    model = build(decoder=decoder, norm_pix_loss=True).float()
    images, mask, streams = draw(model).float(), masks(model)["some"], []
    for block in [*model.blocks, *getattr(model, "decoder_blocks", ())]:
        block.register_forward_hook(lambda module, args, out: streams.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        context = context_of(model)
        out = model(images, mask=mask, **context)
        latent = model.encode(images, mask)
        pred = model.decode(latent, mask, *context.values())
        loss = model.loss(pred, images, mask)
        assert torch.equal(model.predict(images, mask, *context.values()), pred)
    assert set(streams) == {torch.float32}
    assert torch.equal(pred, out.pred) and torch.equal(loss, out.loss)
    assert loss.dtype == torch.float32 and pred.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_forward_draws_the_mask_it_is_asked_for():
    model = build()
    images, noise = draw(model), torch.rand(BATCH, 8)
    asked = model(images, 0.5, 0.5, noise)
    given = model(images, mask=masking.random(BATCH, 8, 0.5, decode_ratio=0.5, noise=noise))
    assert asked.pred.shape == (BATCH, 2, 36)
    assert all(map(torch.equal, pytree.tree_leaves(asked), pytree.tree_leaves(given)))
    assert len(pytree.tree_leaves(asked)) == 6


@pytest.mark.parametrize("decoder", DECODERS)
def test_activation_checkpointing_is_bit_equal(decoder):
    model = build(decoder=decoder, drop_path=0.5)
    images, mask, context = draw(model), masks(model)["ragged"], context_of(model)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        found.append(gradients(model(images, mask=mask, **context).loss, model))
    assert all(map(torch.equal, *(x.values() for x in found)))


# ---- patches without their images ------------------------------------------------------------------------------------


def patches_of(model: MaskedAutoencoder, images: Tensor, mask: fastmim.Mask) -> Patches:
    """Return the patches of images in their dtype, as a loader reads them."""
    visible, predicted = (
        ops.gather_patches(images.double(), ids, model.patch_size).to(images.dtype)
        for ids in (mask.ids_keep, mask.ids_predict)
    )
    return Patches(visible, predicted)


@pytest.mark.parametrize("axes, position", [(1, "rope"), (2, "sincos"), (2, "learned"), (3, "sincos")])
@pytest.mark.parametrize("how", ["float32", "uint8", "uint16", "autocast"])
def test_patches_equal_their_images_bit_for_bit(how, axes, position):
    channels = SHAPES[axes]["in_chans"]
    stats = dict(mean=[0.4] * channels, std=[0.3] * channels)
    for decoder in ("self", None):
        model = build(axes, decoder=decoder, pos_embed=position, norm_pix_loss=True, **stats).float()
        images = torch.rand_like(draw(model)).float()
        if how == "uint8":
            images = (images * 255).to(torch.uint8)
        if how == "uint16":
            images = (images * 65535).int().to(torch.uint16)
        for kind in ("some", "ragged"):
            mask = masks(model)[kind]
            patches = patches_of(model, images, mask) if how != "uint16" else wide_patches(model, images, mask)
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                whole, cut = model(images, mask=mask), model(patches, mask=mask)
            assert torch.equal(cut.pred, whole.pred) and torch.equal(cut.loss, whole.loss)
            torch.testing.assert_close(gradients(cut.loss, model), gradients(whole.loss, model))


def wide_patches(model: MaskedAutoencoder, images: Tensor, mask: fastmim.Mask) -> Patches:
    patches = patches_of(model, images.int().double(), mask)
    return Patches(*(x.round().int().to(torch.uint16) for x in (patches.visible, patches.predicted)))


def test_a_hooked_projection_is_called():
    """It computes ragged rows too; patches without their image are not for it."""
    model = build(norm_pix_loss=True)
    images, mask = draw(model), ragged(model)
    expected, patches = model(images, mask=mask).loss, patches_of(model, images, mask)
    calls = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module)):
        assert_exact(model(images, mask=mask).loss, expected)
        assert_exact(model(patches, mask=mask).loss, expected)
    assert calls.count(model.patch_embed.proj) == 2
    model.patch_embed.proj.register_forward_hook(lambda *_: calls.clear())
    assert_exact(model(images, mask=mask).loss, expected)
    assert not calls
    with pytest.raises(ValueError, match=r"patch_embed.proj must be an unaltered convolution to embed patches without"):
        model(patches, mask=mask)


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder, position", [("both", "rope"), ("cross", "sincos"), (None, "learned")])
def test_compiled_equals_eager_and_is_compiled_once(decoder, position):
    """Only images and masks, which are ragged, change."""
    torch.compiler.reset()
    model = build(decoder=decoder, pos_embed=position, depth=1, decoder_depth=1)
    context = context_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(draw(model), mask=ragged(model), **context).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        images, mask = draw(model), ragged(model)
        ours, theirs = (run(images, mask=mask, **context) for run in (compiled, model))
        for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert_exact(gradients(ours.loss, model), gradients(theirs.loss, model))


def test_a_compiled_step_copies_nothing_to_the_device():
    model, graphs = build(pos_embed="rope", depth=1, decoder_depth=1).float(), []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    torch.compile(lambda x: model(x).loss, fullgraph=True, backend=backend)(draw(model).float()).backward()
    (graph,) = graphs
    assert not [n for n in graph.nodes if n.op == "get_attr" or n.target in (torch.tensor, torch.as_tensor)]


def test_export(tmp_path):
    model = build(decoder="cross", pos_embed="rope", depth=1, decoder_depth=1)
    images, noise = draw(model), torch.rand(BATCH, 8)
    program = torch.export.export(model, (images,), dict(noise=noise))
    torch.export.save(program, tmp_path / "model.pt2")
    images, noise = draw(model), torch.rand(BATCH, 8)
    out = torch.export.load(tmp_path / "model.pt2").module()(images, noise=noise)
    assert type(out) is fastmim.MAEOutput
    torch.testing.assert_close(pytree.tree_leaves(out), pytree.tree_leaves(model(images, noise=noise)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_same_and_separate(copied):
    model = build(decoder="both", pos_embed="rope")
    images, mask, context = draw(model), masks(model)["ragged"], context_of(model)
    other = copied(model)
    assert torch.equal(other(images, mask=mask, **context).loss, model(images, mask=mask, **context).loss)
    with torch.no_grad():
        other.mask_token.add_(1)
    assert not torch.equal(other.mask_token, model.mask_token)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_has_a_gradient(decoder):
    model = build(decoder=decoder, pos_embed="learned")
    context = context_of(model)
    model(draw(model), decode_ratio=0.5, **context).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_names_of_parameters():
    names = {decoder: {n.split(".")[0] for n in build(decoder=decoder).state_dict()} for decoder in DECODERS}
    encoder = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    assert names[None] == encoder | {"mask_token", "decoder_pred"}
    decoder = {"mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert names["cross"] == encoder | decoder
    assert names["self"] == names["both"] == encoder | decoder | {"decoder_embed"}
    blocks = {n.split(".", 2)[2] for n in build(decoder="both").state_dict() if n.startswith("decoder_blocks.0.")}
    assert {n.split(".")[0] for n in blocks} == {
        "norm1", "attn", "norm_cross", "norm_memory", "cross_attn", "norm2", "mlp",
    }  # fmt: skip


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("norm", [True, False, "channel"])
def test_perfect_predictions_give_the_picture_back(axes, norm):
    model = build(axes, norm_pix_loss=norm).float()
    original, mask = torch.rand_like(draw(model)).float(), ragged(model)
    mean = torch.tensor(model.mean or [0.0]).view(-1, *[1] * axes)
    std = torch.tensor(model.std or [1.0]).view(-1, *[1] * axes)
    images = (original - mean) / std
    out = model(images, mask=mask)
    targets = torch.stack([plain_targets(model, x, norm) for x in images])
    out.pred = targets.gather(1, mask.ids_predict[..., None].expand(-1, -1, targets.shape[2]))
    out.pred[~mask.valid_predict] = 100
    shown = torch.zeros(BATCH, model.num_patches, 1, dtype=torch.bool)
    for row, ids in enumerate(rows(mask)):
        shown[row, torch.cat(ids)] = True
    expected = model.unpatchify(torch.where(shown, model.patchify(original), 0.5))
    torch.testing.assert_close(model.reconstruct(images, out), expected, rtol=0, atol=1e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(decoder="other"), ValueError, 'decoder must be "self", "cross", "both" or None, got .other.'),
        (dict(loss="l1"), ValueError, 'loss must be "squared", "absolute" or "huber", got .l1.'),
        (dict(norm_pix_loss="x"), ValueError, 'norm_pix_loss must be True, False or "channel", got .x.'),
        (dict(out_dim=0), ValueError, "out_dim must be at least 1, got 0"),
        (dict(decoder_embed_dim=18), ValueError, "decoder_embed_dim must be a multiple of 4 .* got 18"),
        (dict(decoder_num_heads=3), ValueError, "decoder_embed_dim must be a multiple of decoder_num_heads 3, got 16"),
        (dict(decoder_num_heads=8, pos_embed="rope"), ValueError, "decoder_embed_dim .* 8 for rotary .*, got 16"),
        (dict(decoder_mlp_ratio=0), ValueError, "decoder_mlp_ratio must be positive and finite, got 0"),
        (dict(unknown=1), TypeError, "unexpected keyword argument 'unknown'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        build(**changes)


def bad_calls(model: MaskedAutoencoder):
    images, mask = draw(model), masking.random(BATCH, 8, 0.5)
    latent = torch.zeros(BATCH, 5, 24, dtype=torch.float64)
    patches = patches_of(model, images, mask)
    yield (
        lambda: model(images, context=latent),
        ValueError,
        'context is for the decoder "both" only; this one is .self.',
    )
    yield (
        lambda: model.decode(latent[..., :8], mask),
        ValueError,
        r"latent must have shape \(3, 5, 24\).*got \(3, 5, 8\)",
    )
    yield lambda: model.decode(latent[:, :3], mask), ValueError, r"latent must have shape \(3, 5, 24\)"
    yield lambda: model.decode(latent, None), TypeError, "mask must be a fastmim.Mask"
    yield lambda: model(images[..., :4]), ValueError, r"images must have shape \(any, 3, 12, 8\)"
    yield lambda: model(images[:, :, None]), ValueError, r"images must have shape \(any, 3, 12, 8\)"
    yield lambda: model(images, mask=masking.random(BATCH, 9, 0.5)), ValueError, "of 3 images of 8 patches; got 3 of 9"
    yield lambda: model(images, mask=mask, noise=torch.rand(BATCH, 8)), ValueError, "noise or mask, not both"
    yield lambda: model.predict(images, None), TypeError, "mask must be a fastmim.Mask"
    yield lambda: model(patches), ValueError, "Patches need their mask"
    yield (
        lambda: model(patches, mask=masking.random(BATCH, 8, 0.75)),
        ValueError,
        r"Patches.visible must have shape \(3, 2, 36\).*got \(3, 4, 36\)",
    )
    yield (
        lambda: model.loss(torch.zeros(3, 4, 36), images, mask, weight=torch.zeros(3, 3)),
        ValueError,
        r"weight must have shape \(3, 4\)",
    )
    both = build(decoder="both")
    yield lambda: both(images), ValueError, "context must be given"
    yield lambda: both(images, context=latent), ValueError, r"context must have shape \(3, 9, 24\).*got \(3, 5, 24\)"
    whole = both.encode(images)
    yield lambda: both(images, context=whole[:2]), ValueError, r"context must have shape \(3, 9, 24\).*got \(2, 9, 24\)"
    yield lambda: model.predict(images, None), TypeError, "mask must be a fastmim.Mask"
    yield lambda: model.loss(torch.zeros(3, 6, 36), images, None), TypeError, "mask must be a fastmim.Mask"
    yield lambda: model.encode(images, taps=1), TypeError, "taps must be a sequence of ints, got int"
    out = model(images)
    yield lambda: model.reconstruct(images, out.pred), TypeError, "out must be an MAEOutput, got Tensor"
    yield lambda: model.reconstruct(images[:2], out), ValueError, r"out.mask must have shape \(2, 8\).*got \(3, 8\)"


def test_bad_calls_are_refused():
    for call, error, message in bad_calls(build()):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["patches", "ragged"])
def test_export_takes_masks_and_patches(kind):
    """Both were refused as inputs of torch.export."""
    model = build(decoder="cross", pos_embed="rope", depth=1, decoder_depth=1)
    images = draw(model)
    mask = masks(model)["ragged" if kind == "ragged" else "some"]
    inputs = images if kind == "ragged" else Patches(torch.rand(BATCH, 2, 36), torch.rand(BATCH, 4, 36))
    if kind == "patches":
        mask = masking.random(BATCH, 8, 0.75, decode_ratio=2 / 3)
    program = torch.export.export(model, (inputs,), dict(mask=mask))
    torch.testing.assert_close(program.module()(inputs, mask=mask).loss, model(inputs, mask=mask).loss)


@pytest.mark.fault
def test_masks_are_trees():
    mask = masks(build())["ragged"]
    ones = pytree.tree_map(torch.ones_like, mask)
    assert type(ones) is fastmim.Mask and ones.num_patches == 8 and ones.valid_keep.all()
    leaves, spec = pytree.tree_flatten(masking.random(2, 8, 0.75))
    assert [len(leaves), pytree.tree_unflatten(leaves, spec).valid_keep] == [3, None]


@pytest.mark.fault
def test_a_row_that_keeps_nothing_is_refused():
    model = build()
    removed = torch.ones(BATCH, 8, dtype=torch.bool)
    removed[1:, 0] = False
    with pytest.raises(ValueError, match="row 0 keeps nothing"):
        model(draw(model), mask=masking.from_bool(removed, ragged=True))
