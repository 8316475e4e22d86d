"""SimMIM against plain formulas, and the names and shapes of its checkpoints."""

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import plain_embed, plain_norm, plain_targets, ragged, rows
from torch import Tensor

import fastmim
from fastmim import Mask, Patches, SimMIM, masking, ops
from fastmim.interop.convert import vit_names
from fastmim.train.config import read
from fastmim.train.masks import Masks
from fastmim.train.meter import flops_per_image

# what fullgraph asks for is found out before anything is compiled, which takes a minute
COMPILER = "inductor" if os.environ.get("FASTMIM_TEST_ALL") else "aot_eager"


def build(**changes) -> SimMIM:
    torch.manual_seed(0)
    sizes = dict(img_size=(12, 8), patch_size=2, embed_dim=24, depth=2, num_heads=2)
    model = SimMIM(**sizes | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# ---- the plain form, of one row --------------------------------------------------------------------------------------


def plain_bias(model: SimMIM) -> Tensor:
    """Return the bias (H, 1+L, 1+L) of each pair of tokens, looked up one by one."""
    (height, width), table = model.grid_size, model.rel_pos_bias.relative_position_bias_table
    places = [None, *((y, x) for y in range(height) for x in range(width))]

    def row(query, key) -> int:
        if query is None or key is None:
            return len(table) - (1 if query is key else 3 if query is None else 2)
        return (query[0] - key[0] + height - 1) * (2 * width - 1) + query[1] - key[1] + width - 1

    return torch.stack([torch.stack([table[row(query, key)] for key in places]) for query in places]).permute(2, 0, 1)


def plain_predict(model: SimMIM, image: Tensor, keep: Tensor, predict: Tensor, bias: Tensor) -> Tensor:
    """Predict all patches of an image (C, H, W): (L, P); removed patches that are not predicted are not seen."""
    visible = torch.zeros(model.num_patches, 1, dtype=torch.bool).index_fill(0, keep, True)
    x = torch.cat([model.cls_token[0], torch.where(visible, plain_embed(model, image), model.mask_token[0])])
    x = x if model.pos_embed is None else x + model.pos_embed[0]
    seen = torch.zeros(len(x), dtype=torch.bool).index_fill(0, torch.cat([keep, predict]) + 1, True)
    seen[0] = True
    bias = bias.masked_fill(~seen, -math.inf)
    for block in model.blocks:
        q, k, v = (
            t.unflatten(1, (2, -1)).transpose(0, 1) for t in block.attn.qkv(plain_norm(block.norm1, x)).chunk(3, 1)
        )
        mixed = (q @ k.mT / math.sqrt(q.shape[2]) + bias).softmax(-1) @ v
        x = x + block.ls1.gamma * block.attn.proj(mixed.transpose(0, 1).flatten(1))
        x = x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(plain_norm(block.norm2, x))))
    return model.decoder_pred(plain_norm(model.norm, x)[1:])


def plain_loss(model: SimMIM, images: Tensor, mask: Mask) -> Tensor:
    errors, bias = [], plain_bias(model)
    for image, (keep, predict) in zip(images, rows(mask)):
        pred = plain_predict(model, image, keep, predict, bias)[predict]
        errors.append((pred - plain_targets(model, image)[predict]).abs().mean(1))
    return torch.cat(errors).mean()


@pytest.mark.parametrize("kind", ["cells", "some", "ragged"])
def test_equals_the_plain_form(kind):
    model, images = build(), torch.randn(3, 3, 12, 8, dtype=torch.float64)
    mask = {"cells": None, "some": masking.random(3, 24, 0.6, decode_ratio=0.5), "ragged": ragged(model)}[kind]
    out = model(images, mask=mask)
    if mask is None:
        # of 6 cells, 4 are removed: 0.6 of them, rounded up; fastmim.masking.cells would keep int(6 · 0.4) = 2 as well
        cells = out.mask.view(3, 3, 2, 2, 2).transpose(2, 3).flatten(3).flatten(1, 2)
        assert torch.equal(cells.amin(2), cells.amax(2)) and (cells[..., 0].sum(1) == 4).all()
        mask = Mask(out.ids_keep, out.ids_predict, out.ids_restore, 24)
    expected = plain_loss(model, images, mask)
    assert_exact(out.loss, expected)
    assert_exact(gradients(out.loss, model), gradients(expected, model))
    model.set_grad_checkpointing()
    assert_exact(model(images, mask=mask).loss, expected)


def test_float32_agrees_with_the_plain_form():
    model, images = build(pos_embed="learned"), torch.randn(2, 3, 12, 8, dtype=torch.float64)
    mask = masking.cells(2, (6, 4), 2, 0.6)
    expected = plain_loss(model, images, mask)
    single = copy.deepcopy(model).float()
    out = single(images.float(), mask=mask)
    assert (out.loss - expected).abs() <= 1e-5 * expected
    wanted = gradients(expected, model)
    for name, found in gradients(out.loss, single).items():
        # that of the keys' bias is zero up to rounding
        scale = wanted[name].norm() if not name.endswith("qkv.bias") else wanted[name].norm() + found.norm()
        assert (found - wanted[name]).norm() <= 1e-5 * scale, name


def test_shares_of_cells_are_rounded_up():
    model = build(img_size=(20, 20))  # 25 cells
    with torch.no_grad():
        images = torch.zeros(1, 3, 20, 20, dtype=torch.float64)
        assert model(images, 0.5).mask.sum() == 13 * 4 and model(images, 0.6).mask.sum() == 15 * 4


def test_whole_images_and_states():
    """Without a mask all patches are encoded; states of taps are those of all tokens in grid order."""
    model, images = build(), torch.randn(2, 3, 12, 8, dtype=torch.float64)
    everything, bias = torch.arange(24), plain_bias(model)
    plain = torch.stack([plain_predict(model, image, everything, everything[:0], bias) for image in images])
    assert_exact(model.decoder_pred(model.encode(images)[:, 1:]), plain)
    mask = masking.cells(2, (6, 4), 2, 0.6)
    latent, (state,) = model.encode(images, mask, taps=[1])
    assert state.shape == (2, 25, 24)
    assert_exact(ops.gather_tokens(model.norm(state)[:, 1:], mask.ids_predict), latent)
    assert model.encode(images, mask, taps=[0], stop=True)[0] is None


def test_only_visible_patches_are_embedded():
    """Values of removed patches change targets alone; patches without their images give the same bits."""
    model, images = build(), torch.randn(2, 3, 12, 8, dtype=torch.float64)
    mask = masking.cells(2, (6, 4), 2, 0.6)
    visible, predicted = (ops.gather_patches(images, ids, (2, 2)) for ids in (mask.ids_keep, mask.ids_predict))
    assert torch.equal(model(Patches(visible, predicted), mask=mask).loss, model(images, mask=mask).loss)
    hidden = torch.where(mask.mask.view(2, 1, 6, 4).repeat_interleave(2, 2).repeat_interleave(2, 3), torch.nan, images)
    assert torch.equal(model.predict(hidden, mask), model.predict(images, mask))


def test_compiled_and_narrow():
    model = build(depth=1).float()
    images, mask = torch.randn(2, 3, 12, 8), masking.cells(2, (6, 4), 2, 0.6)
    expected = model(images, mask=mask).loss
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)(images, mask=mask).loss
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(images, mask=mask).loss
    assert narrow.dtype == torch.float32 and (narrow - expected).abs() < 0.03 * expected
    assert all(gradient.isfinite().all() for gradient in gradients(narrow, model).values())


# ---- published checkpoints -------------------------------------------------------------------------------------------


def published(width: int, depth: int, heads: int, grid: tuple[int, int], patch: int) -> dict[str, Tensor]:
    """Return a state with the names and shapes of a checkpoint of SimMIM's ViT."""
    height, columns = grid
    table = (2 * height - 1) * (2 * columns - 1) + 3
    tokens = 1 + height * columns
    shapes = {
        "encoder.cls_token": (1, 1, width), "encoder.mask_token": (1, 1, width),
        "encoder.patch_embed.proj.weight": (width, 3, patch, patch), "encoder.patch_embed.proj.bias": (width,),
        "encoder.rel_pos_bias.relative_position_bias_table": (table, heads),
        "encoder.rel_pos_bias.relative_position_index": (tokens, tokens),
        "encoder.norm.weight": (width,), "encoder.norm.bias": (width,),
        "decoder.0.weight": (3 * patch**2, width, 1, 1), "decoder.0.bias": (3 * patch**2,),
    }  # fmt: skip
    for name, shape in {
        "gamma_1": (width,), "gamma_2": (width,), "attn.q_bias": (width,), "attn.v_bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,), **{f"norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")},
    }.items():  # fmt: skip
        shapes |= {f"encoder.blocks.{index}.{name}": shape for index in range(depth)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_names_and_shapes_are_those_of_public_checkpoints():
    with torch.device("meta"):
        model, state = fastmim.simmim_vit_base_patch16(), published(768, 12, 12, (14, 14), 16)
    model.load_state_dict(state, strict=True)
    assert model.img_size == (224, 224) and model.error == "absolute"
    # without the keys' biases
    assert sum(p.numel() for p in model.parameters()) - 12 * 768 == sum(p.numel() for p in state.values()) - 197**2


def test_public_values_go_where_they_belong():
    """Pixels of the published head, a convolution and a pixel shuffle, are those of `unpatchify`."""
    state = {name: value.double() for name, value in published(24, 2, 2, (4, 4), 2).items()}
    model = build(img_size=8)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.blocks[1].ls2.gamma, state["encoder.blocks.1.gamma_2"])
    q, k, v = model.blocks[0].attn.qkv.bias.chunk(3)
    assert torch.equal(q, state["encoder.blocks.0.attn.q_bias"]) and not k.any()
    assert torch.equal(v, state["encoder.blocks.0.attn.v_bias"])
    latent = torch.randn(2, 16, 24, dtype=torch.float64)
    maps = latent.transpose(1, 2).unflatten(2, (4, 4))
    pixels = F.pixel_shuffle(F.conv2d(maps, state["decoder.0.weight"], state["decoder.0.bias"]), 2)
    assert_exact(model.unpatchify(model.decoder_pred(latent)), pixels)
    again = copy.deepcopy(model)
    again.initialize_weights()
    again.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_initial_weights():
    model = SimMIM(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    assert model.blocks[0].attn.qkv.weight.abs().max() <= 0.02 and not model.rel_pos_bias().any()
    assert 0.0099 < model.blocks[1].mlp.fc2.weight.abs().max() <= 0.01
    assert (model.blocks[1].ls1.gamma == 0.1).all() and not model.blocks[0].attn.qkv.bias.any()
    assert 0.9 / 8 < model.decoder_pred.weight.abs().max() <= 1 / 8


def test_bad_input():
    with pytest.raises(ValueError, match="cell must divide grid"):
        build(cell=4)
    with pytest.raises(ValueError, match=r"patch_size must be an int or \(height, width\), got \(2,\)"):
        build(img_size=(12,), patch_size=(2,))
    with pytest.raises(ValueError, match=r"mask_ratio must be in \(0, 1\), got 1.5"):
        build()(torch.zeros(1, 3, 12, 8, dtype=torch.float64), 1.5)


def test_equals_hugging_face_where_both_have_the_parts():
    """ViTForMaskedImageModeling has SimMIM's mask tokens, head and loss, with learned positions and no layer scale."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    other = transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(image_size=16, patch_size=4, encoder_stride=4, layer_norm_eps=1e-6, **sizes)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = SimMIM(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, layer_scale=None, pos_embed="learned")
    model.load_state_dict(_published_of_hugging_face(other.state_dict()) | zero_bias(model), strict=True)
    images, mask = torch.randn(2, 3, 16, 16), masking.cells(2, (4, 4), 2, 0.6)
    theirs, ours = other(images, bool_masked_pos=mask.mask), model(images, mask=mask)
    assert (ours.loss - theirs.loss).abs() <= 1e-5 * theirs.loss
    theirs.loss.backward()
    found = gradients(ours.loss, model)
    wanted = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    named = _published_of_hugging_face(wanted)
    expected = SimMIM._published(dict(named))
    for name in found.keys() - {"rel_pos_bias.relative_position_bias_table"}:
        scale = expected[name].norm() + (found[name].norm() if name.endswith("qkv.bias") else 0)
        assert (found[name] - expected[name]).norm() <= 1e-5 * scale, name


def zero_bias(model: SimMIM) -> dict[str, Tensor]:
    name = "rel_pos_bias.relative_position_bias_table"
    return {f"encoder.{name}": torch.zeros_like(model.state_dict()[name])}


def _published_of_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of ViTForMaskedImageModeling under SimMIM's published names, with qkv joined."""
    ours = vit_names.rename(state, "model")
    ours["mask_token"] = ours.pop("vit.embeddings.mask_token")
    return {name if name.startswith("decoder.") else f"encoder.{name}": value for name, value in ours.items()}


@pytest.mark.parametrize("position", ["none", "learned"])
def test_each_parameter_has_a_gradient(position):
    """DDP needs no search for unused parameters."""
    model = build(pos_embed=position)
    model(torch.randn(2, 3, 12, 8, dtype=torch.float64)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_work_is_paid_for_where_it_is_predicted():
    """FLOPs by a formula: of the last block all tokens pay for attention, and the predicted ones for the rest."""
    settings = ["model_options.patch_size=4", "image_size=32", "model_options.embed_dim=24", "model_options.depth=3"]
    config = read("simmim_base", [*settings, "model_options.num_heads=2", "device=cpu"])
    masks = Masks(config.mask_settings, (8, 8))
    (kept, predicted), width, values, tokens = masks.counts, 24, 48, 65
    assert kept + predicted == 64

    def block(rest: int) -> int:
        # two products of attention forward and five backward; a layer has three of each
        return 7 * 2 * tokens**2 * width + 3 * 2 * width**2 * (3 * tokens + 9 * rest)

    embedding, head = 2 * 2 * kept * values * width, 3 * 2 * predicted * width * values
    assert flops_per_image(config, masks) == 2 * block(tokens) + block(predicted) + embedding + head
