"""Pixio against plain formulas, and the names and shapes of its checkpoints."""

import pytest
import torch
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import plain_forward

import fastmim
from fastmim import Mask, Pixio


def build(**changes) -> Pixio:
    torch.manual_seed(0)
    sizes = dict(img_size=(32, 16), patch_size=2, embed_dim=24, depth=2, num_heads=2)
    decoder = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
    model = Pixio(**sizes | decoder | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_equals_the_plain_form():
    model, images = build(), torch.randn(2, 3, 32, 16, dtype=torch.float64)
    out = model(images, 0.75)
    cells = out.mask.view(2, 4, 4, 2, 4).transpose(2, 3).flatten(3).flatten(1, 2)
    assert torch.equal(cells.amin(2), cells.amax(2)) and (cells[..., 0].sum(1) == 6).all()
    mask = Mask(out.ids_keep, out.ids_predict, out.ids_restore, 128)
    loss, predictions = plain_forward(model, images, mask)
    assert_exact(out.loss, loss)
    assert_exact(out.pred, torch.stack(predictions))
    assert_exact(gradients(out.loss, model), gradients(loss, model))


def test_drop_path_rises_over_the_encoder_alone():
    model = build(depth=3, drop_path=0.4)
    assert [block.drop_path for block in model.blocks] == [0, 0.2, 0.4]
    assert not any(block.drop_path for block in model.decoder_blocks)


def test_names_and_shapes_are_those_of_public_checkpoints():
    """Those of facebookresearch/mae, with 8 class tokens and a decoder of 32 blocks."""
    with torch.device("meta"):
        model = fastmim.pixio_vit_huge_patch16()
    shapes = {
        "cls_token": (1, 8, 1280), "pos_embed": (1, 264, 1280), "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 264, 512), "patch_embed.proj.weight": (1280, 3, 16, 16),
        "patch_embed.proj.bias": (1280,), "decoder_embed.weight": (512, 1280), "decoder_embed.bias": (512,),
        "decoder_pred.weight": (768, 512),
        "decoder_pred.bias": (768,),
    }  # fmt: skip
    for side, dim in (("", 1280), ("decoder_", 512)):
        shapes |= {f"{side}norm.{kind}": (dim,) for kind in ("weight", "bias")}
        for name, shape in {
            "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,), "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
            **{f"norm{i}.{kind}": (dim,) for i in (1, 2) for kind in ("weight", "bias")},
        }.items():  # fmt: skip
            shapes |= {f"{side}blocks.{index}.{name}": shape for index in range(32)}
    model.load_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, strict=True)
    assert model.blocks[0].attn.head_dim == 80 and model.pos_embed.requires_grad


def test_bad_cells_are_refused():
    with pytest.raises(ValueError, match="cell must divide grid"):
        build(cell=3)
    with pytest.raises(ValueError, match="keeps none of the 8 cells"):
        build()(torch.zeros(1, 3, 32, 16, dtype=torch.float64), 0.99)
